"""A residual that DeepSpeed ZeRO-3 has dropped is noticed at the first forward pass; here with its marks on weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import pissa_kernels as pk
from pissa_kernels.peft.guards.merging import check_merge
from pissa_kernels.peft.weights.first_pass import FirstPass

from ...support.adapted import config, lora_layers
from ...support.models import build, output

NAME = "model.layers.0.self_attn.q_proj"


def marked() -> Any:
    """A model whose weights DeepSpeed holds, gathered."""
    base = build("llama")
    for index, parameter in enumerate(base.parameters()):
        parameter.ds_id, parameter.ds_shape = index, parameter.shape
    with pk.patch_peft():
        return peft.get_peft_model(base, config("llama")).eval()


def dropped() -> Any:
    """The same after DeepSpeed has put the original weight of one layer back."""
    model = marked()
    lora_layers(model)[NAME].get_base_layer().weight.data.copy_(build("llama").get_submodule(NAME).weight)
    return model


def waiting(model: nn.Module) -> list[FirstPass]:
    return [hook for each in model.modules() for hook in each._forward_hooks.values() if isinstance(hook, FirstPass)]


def unpickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def same(model: Any) -> Any:
    return model


WAYS: list[Callable[[Any], Any]] = [same, copy.deepcopy, unpickled, saved]


@pytest.mark.parametrize("way", WAYS)
def test_a_dropped_residual_is_named(way: Callable[[Any], Any]) -> None:
    model = way(dropped())
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"\Alayer '{NAME}', weight \(96, 96\): .*modifier_rank=0[^\n]*\Z"):
            output(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_right_model_is_checked_once(way: Callable[[Any], Any]) -> None:
    model = marked()
    expected = output(copy.deepcopy(model))
    model = way(model)
    assert len(waiting(model)) == len(lora_layers(model)) == 14
    assert torch.equal(output(model), expected)
    assert not waiting(model)


def test_a_copy_checks_its_own_weights() -> None:
    model = marked()
    other = copy.deepcopy(model)
    lora_layers(other)[NAME].get_base_layer().weight.data.mul_(2)
    output(model)
    with pytest.raises(ValueError, match="modifier_rank=0"):
        output(other)


def test_other_models_have_no_hook() -> None:
    with pk.patch_peft():
        model = peft.get_peft_model(build("llama"), config("llama"))
    assert not waiting(model)


def test_a_merged_or_unloaded_layer_is_not_compared() -> None:
    model = marked()
    model.merge_adapter()
    output(model)
    assert len(waiting(model)) == 14
    model.unmerge_adapter()
    output(model)
    assert not waiting(model)
    bare = marked().unload()
    output(bare)
    assert not waiting(bare)


@pytest.mark.parametrize("way", ["partitioned", "flat"])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload", "unload"])
def test_weights_in_pieces_are_neither_merged_nor_unloaded(way: str, method: str) -> None:
    """The last layer is in pieces, so that a check of each layer in turn would come too late."""
    model = marked()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    name = list(lora_layers(model))[-1]
    weight = lora_layers(model)[name].get_base_layer().weight
    whole, weight.data = weight.data, torch.empty(0) if way == "partitioned" else weight.data.flatten()[:500]
    words = "GatheredParameters" if way == "partitioned" else "GatheredParameters|summon_full_params"
    with pytest.raises(ValueError, match=rf"\Alayer '{name}'[^\n]*({words})[^\n]*\Z"):
        getattr(model, method)()
    weight.data = whole
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_flat_piece_is_told_from_a_partition() -> None:
    with pk.patch_peft():
        model = peft.get_peft_model(build("llama"), config("llama"))
    layer = lora_layers(model)[NAME]
    layer.get_base_layer().weight.data = torch.zeros(0)
    with pytest.raises(ValueError, match="FSDP keeps flat pieces of it; call it within FullyShardedDataParallel"):
        check_merge(layer, ["default"])
