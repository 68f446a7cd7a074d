"""Every kind of layer in what PEFT can do with an adapted model: copies, mixed batches, scales, swaps, combinations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from torch.utils.checkpoint import checkpoint

import pissa_kernels as pk

from ...support.kinds import KINDS, build, inputs_of, lora_config
from ...support.kinds_operations import allowed, exact_output, off, output, patched, train

every_kind = pytest.mark.parametrize("name", KINDS)
# PEFT's adapters of these are part of the weight, which is one for the whole batch
UNMIXED = [name for name, kind in KINDS.items() if "target_parameters" in kind.settings] + ["MultiheadAttention"]
# PEFT combines the factors of these by products of matrices
COMBINED = [name for name in KINDS if name in ("Linear", "Conv1D") or name.startswith("Embedding")]


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@every_kind
def test_copies(name: str, copied: Callable[[Any], Any]) -> None:
    base = build(name)
    model, _ = patched(name, base)
    expected = train(name, model)
    other = copied(model)
    assert torch.equal(expected, output(name, other))
    with pk.original_model(other):
        assert off(exact_output(name, base), output(name, other)) <= allowed(name, base)
    train(name, other)
    assert torch.equal(expected, output(name, model))


@pytest.mark.parametrize("name", [name for name in KINDS if name not in UNMIXED])
def test_a_batch_of_several_adapters(name: str) -> None:
    base = build(name)
    model, _ = patched(name, base)
    expected = {"default": train(name, model), "__base__": exact_output(name, base)}
    with pk.patch_peft():
        model.add_adapter("second", lora_config(name, 2))
    model.set_adapter("second")
    expected["second"] = train(name, model)
    x = inputs_of(name, base)
    for start in range(3):
        names = [("default", "__base__", "second")[(start + row) % 3] for row in range(len(x))]
        with torch.no_grad():
            found = model(x, adapter_names=names)
        for row, adapter in enumerate(names):
            assert off(expected[adapter][row], found[row]) <= 2 * allowed(name, base), adapter


@pytest.mark.parametrize("name", UNMIXED)
def test_a_batch_that_peft_does_not_mix(name: str) -> None:
    base = build(name)
    model, _ = patched(name, base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = inputs_of(name, base)
    with pytest.raises((TypeError, ValueError), match="does not support mixed"), torch.no_grad():
        model(x, adapter_names=["default"] * len(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@every_kind
def test_scales(name: str) -> None:
    """W + w·s·(B·A − B₀·A₀) for a scale w: linear in w, and the base at 0."""
    base = build(name)
    model, _ = patched(name, base)
    expected = train(name, model)
    layers = [module for module in model.modules() if hasattr(module, "set_scale")]
    for layer in layers:
        layer.set_scale("default", 0.0)
    assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
    for layer in layers:
        layer.set_scale("default", 1.0)
    assert off(expected, output(name, model)) <= allowed(name, base)


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("Embedding")])  # which PEFT cannot
def test_values_that_are_swapped_in(name: str, tmp_path: Path) -> None:
    base = build(name)
    other, _ = patched(name, base)
    expected = train(name, other, steps=5)
    other.save_pretrained(tmp_path)
    model, _ = patched(name, base)
    assert off(expected, train(name, model)) > 5 * allowed(name, base)
    with pk.patch_peft():
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert off(expected, output(name, model)) <= allowed(name, base)
    with pk.original_model(model):
        assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)


def two_adapters(name: str, base: Any) -> tuple[Any, torch.Tensor]:
    model, _ = patched(name, base)
    first = train(name, model)
    with pk.patch_peft():
        model.add_adapter("second", lora_config(name, 2))
    model.set_adapter("second")
    train(name, model)
    return model, first


@pytest.mark.parametrize("way", ["cat", "svd"])
@pytest.mark.parametrize("name", COMBINED)
def test_a_weighted_adapter(name: str, way: str) -> None:
    base = build(name)
    model, first = two_adapters(name, base)
    model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "both", combination_type=way)
    model.set_adapter("both")
    assert off(first, output(name, model)) <= 3 * allowed(name, base)


@pytest.mark.parametrize("way", ["cat", "svd"])
@pytest.mark.parametrize("name", [name for name in KINDS if name not in COMBINED])
def test_a_weighted_adapter_of_packed_factors_is_refused(name: str, way: str) -> None:
    base = build(name)
    model, first = two_adapters(name, base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^layer 'layer.*PEFT combines the factors"):
        model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "both", combination_type=way)
    assert list(model.peft_config) == ["default", "second"]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.set_adapter("default")
    assert off(first, output(name, model)) <= allowed(name, base)


@every_kind
def test_gradients_with_checkpointing(name: str) -> None:
    """A pass that is run again in the backward pass computes with the same weights."""
    base = build(name)
    model, _ = two_adapters(name, base)
    x = inputs_of(name, base)
    parameters = [each for each in model.parameters() if each.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    again = checkpoint(model, x, use_reentrant=False)
    found = torch.autograd.grad(again.square().sum(), parameters)
    for wanted, gradient in zip(expected, found, strict=True):
        assert off(wanted, gradient) <= 1e-6


@every_kind
def test_passes_leave_the_stored_weights(name: str) -> None:
    """No drift: PEFT adds to the weights of an attention and subtracts again, in the dtype of the model."""
    base = build(name, torch.bfloat16)
    model, _ = two_adapters(name, base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [each.requires_grad for each in model.parameters()]
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        for _ in range(3):
            output(name, model)
            model(inputs_of(name, base)).float().sum().backward()
        with model.disable_adapter():
            output(name, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [each.requires_grad for each in model.parameters()] == trained
