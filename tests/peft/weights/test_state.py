"""What a layer computes in each state: against a float64 model with the weights W + Σ ΔW_j."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn

import pissa_kernels as pk
from pissa_kernels.peft.weights import forward
from pissa_kernels.peft.weights.record import records

from ...support.adapted import DTYPES, NAMES, allowed, config, made, moved, off, train
from ...support.changes import layers
from ...support.models import build, output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_disabled_adapter_leaves_the_original_model(name: str, dtype: torch.dtype) -> None:
    expected, adapted = made(name, dtype)
    train(adapted)
    assert off(expected, adapted, "default") <= allowed(dtype)
    assert off(expected, adapted) > 3 * allowed(dtype)
    with adapted.disable_adapter():
        assert off(expected, adapted) <= allowed(dtype)
    assert off(expected, adapted, "default") <= allowed(dtype)


def test_the_one_active_adapter_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("a correction was computed")

    monkeypatch.setattr(forward, "_added", fail)
    _, adapted = made(use_rslora=True, lora_alpha=13)
    with pk.patch_peft():
        adapted.add_adapter("shared", config("llama", use_rslora=True, lora_alpha=13))
    for adapter in ("default", "shared"):
        adapted.set_adapter(adapter)
        output(adapted)
    adapted.merge_adapter()
    output(adapted)
    adapted.unmerge_adapter()
    for layer in layers(adapted).values():
        layer.scale_layer(0.7)
        layer.unscale_layer(0.7)
    output(adapted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_set_of_active_adapters(name: str, dtype: torch.dtype) -> None:
    expected, adapted = made(name, dtype)
    kinds = {"shared": {}, "other": {"r": 2, "lora_alpha": 5}, "plain": {"init_lora_weights": True}}
    for adapter, changes in kinds.items():
        adapted.add_adapter(adapter, config(name, **changes))  # after the block
        expected.made(adapted, adapter)
    train(adapted)
    for active in (["default"], ["shared"], ["other"], ["plain"], ["default", "plain"], ["other", "shared", "default"]):
        adapted.base_model.set_adapter(active)
        assert off(expected, adapted, *active) <= allowed(dtype), active
    with adapted.disable_adapter():
        assert off(expected, adapted) <= allowed(dtype)


def test_another_scale() -> None:
    expected, adapted = made()
    train(adapted)
    for scale in (0.0, 0.5, 3.0):
        for layer in layers(adapted).values():
            layer.set_scale("default", scale)
        assert off(expected, adapted, "default") <= allowed(torch.float32), scale


def test_a_batch_with_an_adapter_for_each_sample() -> None:
    expected, adapted = made()
    adapted.add_adapter("other", config("llama", r=2))
    expected.made(adapted, "other")
    adapted.add_adapter("plain", config("llama", init_lora_weights=True, target_modules=["q_proj"]))
    expected.made(adapted, "plain")
    train(adapted)
    names = ["default", "__base__", "other", "plain", "default"]
    ids = torch.arange(5 * 12).reshape(5, 12)
    with torch.no_grad():
        mixed = adapted(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            active = [] if name == "__base__" else [name]
            alone = expected.model(adapted, active)(input_ids=ids[row : row + 1]).logits
            assert moved(alone, mixed[row : row + 1].double()) <= allowed(torch.float32), name


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_model(dynamic: bool | None) -> None:
    torch.compiler.reset()
    expected, adapted = made()
    train(adapted)
    compiled = torch.compile(adapted, backend="eager", dynamic=dynamic)
    assert off(expected, compiled, "default") <= allowed(torch.float32)
    with adapted.disable_adapter():
        assert off(expected, compiled) <= allowed(torch.float32)
    with pk.original_model(compiled):
        assert off(expected, compiled) <= allowed(torch.float32)
    assert off(expected, compiled, "default") <= allowed(torch.float32)
    for layer in layers(adapted).values():
        layer.set_scale("default", 0.5)
    assert off(expected, adapted, "default") <= allowed(torch.float32)
    assert moved(output(adapted), output(compiled)) <= allowed(torch.float32)


def test_a_compiled_layer_is_one_graph() -> None:
    torch.compiler.reset()
    net = nn.Sequential(nn.Linear(24, 16))
    W = net[0].weight.detach().clone()
    with pk.patch_peft():
        adapted = peft.get_peft_model(net, config("llama", target_modules=["0"]))
    layer, x = adapted.base_model.model[0], torch.randn(3, 24)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    layer.enable_adapters(False)
    expected = nn.functional.linear(x, W, layer.bias)
    with torch.no_grad():
        layer(x)  # copies of the factors on this device
        assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_gradients_through_the_correction() -> None:
    expected, adapted = made()
    adapted.add_adapter("other", config("llama", r=2))
    expected.made(adapted, "other")
    train(adapted)
    adapted.set_adapter("other")
    with torch.inference_mode():
        output(adapted)  # makes no inference tensors that training would meet
    embeddings = torch.randn(2, 5, 96, requires_grad=True)
    adapted(inputs_embeds=embeddings).logits.square().mean().backward()
    twin = embeddings.detach().double().requires_grad_()
    expected.model(adapted, ["other"])(inputs_embeds=twin).logits.square().mean().backward()
    assert moved(twin.grad, embeddings.grad.double()) <= 10 * allowed(torch.float32)


def test_autocast() -> None:
    expected, adapted = made()
    train(adapted)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad(), adapted.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        got = adapted(input_ids=ids).logits
    assert moved(output(expected.base), got.double()) <= allowed(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_later(dtype: torch.dtype) -> None:
    expected, adapted = made()
    train(adapted)
    adapted.to(dtype)
    bound = allowed(torch.bfloat16) if dtype == torch.bfloat16 else allowed(torch.float32)
    assert off(expected, adapted, "default") <= bound
    with pk.original_model(adapted):
        assert off(expected, adapted) <= bound
    adapted.merge_adapter()
    assert off(expected, adapted, "default") <= bound
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        assert off(expected, adapted) <= bound


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_correct_and_guard_themselves(way: str) -> None:
    expected, adapted = made()
    for layer in layers(adapted).values():
        forward.factors_on(layer, torch.device("meta"))
        assert layer.pissa_copies.by_device
    other = copy.deepcopy(adapted) if way == "deepcopy" else pickle.loads(pickle.dumps(adapted))
    assert not any(layer.pissa_copies.by_device for layer in layers(other).values())
    del adapted
    other.add_adapter("other", config("llama", r=2))
    expected.made(other, "other")
    train(other)
    for adapter in ("default", "other"):
        other.set_adapter(adapter)
        assert off(expected, other, adapter) <= allowed(torch.float32)
        other.merge_adapter()
        assert off(expected, other, adapter) <= allowed(torch.float32)
        other.unmerge_adapter()
    assert moved(output(expected.base), output(other.unload())) <= allowed(torch.float32)


def test_nothing_is_added_to_the_state_dict() -> None:
    _, adapted = made()
    stock = peft.get_peft_model(build("llama"), config("llama", init_lora_weights=True))
    assert adapted.state_dict().keys() == stock.state_dict().keys()


def test_records_share_their_factors() -> None:
    _, adapted = made()
    adapted.add_adapter("shared", config("llama"))
    adapted.add_adapter("other", config("llama", r=2))
    for layer in layers(adapted).values():
        first, second, third = records(layer)
        assert (first.shared, second.shared, third.shared) == (False, True, True)
        assert second.lora_A is first.lora_A
        assert third.lora_A.shape[0] == 2
