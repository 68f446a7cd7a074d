"""What tests do with models that have a PiSSA adapter: made, trained, compared with rounding."""

from __future__ import annotations

import copy
import functools
from typing import Any

import peft
import pytest
import torch
from torch import nn

import pissa_kernels as pk
from pissa_kernels.peft.layers import batches

from .changes import Expected
from .models import TARGETS, build, output

DTYPES = [torch.float32, torch.bfloat16]
NAMES = ["gpt2", "llama", "bert"]


def config(name: str, **changes: Any) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa", "target_modules": TARGETS[name]}
    return peft.LoraConfig(**(settings | {"fan_in_fan_out": name == "gpt2"} | changes))


def lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    return {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.layer.LoraLayer)
    }


def moved(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


def make(name: str, dtype: torch.dtype, **changes: Any) -> tuple[Any, Any]:
    """An untouched model, and one with a PiSSA adapter."""
    base = build(name, dtype)
    with pk.patch_peft():
        adapted = peft.get_peft_model(copy.deepcopy(base), config(name, **changes))
    return base, adapted.eval()


def train(adapted: Any) -> None:
    """Move every A and B, as training does."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            size = 0.5 * parameter.detach().abs().mean()
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


@functools.cache
def allowed(dtype: torch.dtype) -> float:
    """Bound on the change of an output: twice what rounding in this dtype alone does to it, in the worst model."""
    models = [build(name, dtype) for name in NAMES]
    return max(2 * moved(output(copy.deepcopy(model).double()), output(model)) for model in models)


def no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an SVD was run")

    monkeypatch.setattr("pissa_kernels.peft.layers.layer.principal_factors", fail)
    monkeypatch.setattr(batches, "principal_factors_of_batch", fail)


def residuals(adapted: Any) -> dict[str, torch.Tensor]:
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in lora_layers(adapted).items()}


def state(model: nn.Module) -> dict[str, tuple[torch.Tensor, ...]]:
    """Residual, A and B of every layer."""
    return {
        name: (
            layer.get_base_layer().weight.detach().clone(),
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
        )
        for name, layer in lora_layers(model).items()
    }


def assert_same(left: dict[str, tuple[torch.Tensor, ...]], right: dict[str, tuple[torch.Tensor, ...]]) -> None:
    assert left.keys() == right.keys()
    for name, tensors in left.items():
        for one, other in zip(tensors, right[name], strict=True):
            assert one.dtype == other.dtype, name
            assert torch.equal(one, other), name


def made(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Expected, Any]:
    base = build(name, dtype)
    expected = Expected(base)
    with pk.patch_peft():
        adapted = peft.get_peft_model(base, config(name, **changes)).eval()
    return expected, expected.made(adapted)


def off(expected: Expected, adapted: Any, *active: str) -> float:
    return moved(output(expected.model(adapted, active)), output(adapted))


def unchanged(adapted: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in adapted.state_dict().items()}


def assert_unchanged(before: dict[str, torch.Tensor], adapted: Any) -> None:
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def beside(expected: Expected, adapted: Any, name: str, **changes: Any) -> None:
    adapted.add_adapter(name, config("llama", **changes))
    expected.made(adapted, name)
