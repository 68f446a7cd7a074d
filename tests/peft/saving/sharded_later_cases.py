"""What several processes check of models that are sharded after the adapter is made, for ``test_sharded_later.py``."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers
from pissa_kernels.peft.weights.record import records

from ...support.adapted import config
from ...support.models import build, output
from ...support.sharded import WIDTH, assert_is_base, assert_later_use, sharded, sharded_later, train
from ...support.together import folder, same_everywhere, together

EFFICIENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
# Filled by process 0, as accelerate does it.
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def adapted(base: Any, **changes: Any) -> Any:
    with pk.patch_peft():
        return peft.get_peft_model(base, config("llama", **changes))


def filled_from_first(model: Any, whole: dict[str, Tensor]) -> Any:
    """The model, sharded, with the values that it has in process 0."""
    kept = dict(build("llama", width=WIDTH).named_buffers())
    model = sharded_later(model.to_empty(device="cpu") if next(model.parameters()).is_meta else model)
    set_model_state_dict(model, whole, options=BROADCAST)
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name.removeprefix("base_model.model.")])
    return model


def state_of_first(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()} if dist.get_rank() == 0 else {}


def assert_known_everywhere(model: Any) -> None:
    kept = [record for _, layer in lora_layers(model) for record in records(layer)]
    assert len(kept) == 14
    for record in kept:
        same_everywhere(record.lora_A, record.lora_B, record.before, record.after, record.report.singular_values)


@together(2, 3)
def check_fully_shard_after_the_adapter() -> None:
    base = build("llama", width=WIDTH)
    logits = output(base)
    model = sharded_later(adapted(copy.deepcopy(base)))
    assert_is_base(model, logits)
    assert_later_use(model, base, logits, folder("after"))


def others_on_meta(base: Any) -> Any:
    return copy.deepcopy(base) if dist.get_rank() == 0 else copy.deepcopy(base).to("meta")


@together(2, 3)
def check_share_initial() -> None:
    """By hand: the weights are in process 0 alone, and nothing has told the hook so."""
    base = build("llama", width=WIDTH)
    logits = output(base)
    with contextlib.ExitStack() as stack:
        if dist.get_rank():
            stack.enter_context(pytest.warns(UserWarning, match="meta device"))
        model = adapted(others_on_meta(base))
    if dist.get_rank():
        layer = next(layer for _, layer in lora_layers(model))
        layer(torch.zeros(1, WIDTH, device="meta"))
        layer.enable_adapters(False)
        with pytest.raises(RuntimeError, match=r"layer .*q_proj.*initial factors are not known .*share_initial"):
            layer(torch.zeros(1, WIDTH, device="meta"))
        layer.enable_adapters(True)
    model = filled_from_first(model, state_of_first(model))
    assert_is_base(model, logits)
    pk.share_initial(model)
    assert_known_everywhere(model)
    assert_later_use(model, base, logits, folder("shared"))


@together(2)
def check_share_initial_is_refused() -> None:
    base = build("llama", width=WIDTH)
    with pytest.raises((ValueError, RuntimeError), match="no layer of this model was initialized"):
        pk.share_initial(copy.deepcopy(base))
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"] if dist.get_rank() else ["v_proj"])
    with pytest.raises(
        (ValueError, RuntimeError), match=r"has initial factors of layer 'model\.layers\.0\.self_attn\.v_proj'"
    ):
        pk.share_initial(model)


@contextlib.contextmanager
def efficient_loading() -> Iterator[None]:
    with mock.patch.dict(os.environ, EFFICIENT):
        yield


@together(2, 3)
def check_ram_efficient_loading() -> None:
    """The other processes have the model on the meta device, arbitrary values, NaN, or the weights themselves."""
    base = build("llama", width=WIDTH)
    logits = output(base)
    for kind in ("meta", "arbitrary", "nan", "weights"):
        mine = copy.deepcopy(base)
        if dist.get_rank() and kind != "weights":
            mine = mine.to("meta") if kind == "meta" else mine
            for parameter in mine.parameters() if kind != "meta" else ():
                parameter.data = torch.full_like(parameter, torch.nan) if kind == "nan" else torch.randn_like(parameter)
        with efficient_loading(), pk.patch_peft() as report:
            model = peft.get_peft_model(mine, config("llama"))
        assert len(report.layers) == 14
        assert_known_everywhere(model)
        if kind == "weights":  # right before it is filled, too
            assert_is_base(model, logits)
        model = filled_from_first(model, state_of_first(model))
        assert_is_base(model, logits)
        assert_later_use(model, base, logits, folder(f"efficient-{kind}"))


@together(2)
def check_refusals_with_ram_efficient_loading() -> None:
    base = build("llama", width=WIDTH)
    base.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with efficient_loading(), pytest.raises((ValueError, RuntimeError), match=r"layers\.1\.mlp\.up_proj.*holds NaN"):
        adapted(others_on_meta(base))
    assert not any(records(layer) for _, layer in lora_layers(base))


@together(2, 3)
def check_distributed_checkpoint() -> None:
    """Saved by all processes, loaded by all into a sharded model of other factors, or without any, and by one."""
    base = build("llama", width=WIDTH)
    logits = output(base)
    model = adapted(sharded(copy.deepcopy(base)))
    train(model)
    trained, path = output(model), folder("checkpoint")
    dcp.save({"model": get_model_state_dict(model), "pissa": pk.PissaState(model)}, checkpoint_id=path)

    def check(loaded: Any, **options: Any) -> None:
        state = {"model": get_model_state_dict(loaded), "pissa": pk.PissaState(loaded, loading=True)}
        dcp.load(state, checkpoint_id=path, **options)
        set_model_state_dict(loaded, state["model"])
        assert float((output(loaded) - trained).abs().max()) <= 1e-5 * float(logits.abs().max())
        with loaded.disable_adapter():
            assert_is_base(loaded, logits)

    with pk.patch_peft(seed=7):
        other = peft.get_peft_model(sharded(copy.deepcopy(base)), config("llama", init_lora_weights="pissa_niter_1"))
    check(other)
    assert_known_everywhere(other)
    with pytest.warns(UserWarning, match="meta device"):
        empty = adapted(copy.deepcopy(base).to("meta"))
    whole = {key: torch.zeros(value.shape) for key, value in empty.state_dict().items()}
    check(filled_from_first(empty, whole))
    if dist.get_rank() == 0:
        alone = adapted(copy.deepcopy(base))
        check(alone, no_dist=True)
        alone.save_pretrained(path / "adapter")
        base.save_pretrained(path / "base")
        with pk.patch_peft():
            again = peft.PeftModel.from_pretrained(copy.deepcopy(base), path / "adapter")
        assert float((output(again) - trained).abs().max()) <= 1e-5 * float(logits.abs().max())
    dist.barrier()


@together(2)
def check_replicas_of_ddp() -> None:
    base = build("llama", width=WIDTH)
    logits = output(base)
    model = adapted(copy.deepcopy(base))
    replica = torch.nn.parallel.DistributedDataParallel(model)
    replica(input_ids=torch.arange(24).reshape(2, 12) + dist.get_rank()).logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == 28
    same_everywhere(*gradients)
    with pk.original_model(model):
        assert_is_base(model, logits)
