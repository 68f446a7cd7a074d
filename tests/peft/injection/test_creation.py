"""Adapters that PiSSA will overwrite are created as zeros; all others as PEFT creates them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import pissa_kernels as pk
from pissa_kernels.peft.injection.creation import creating


def config(init: Any) -> Any:
    return SimpleNamespace(init_lora_weights=init)


def created() -> nn.Linear:
    """What PEFT makes for B: with a bias."""
    return nn.Linear(6, 5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_zeros_without_random_numbers(init: str) -> None:
    target = nn.Linear(5, 6)
    state = torch.get_rng_state()
    with creating(config(init), target):
        layer = created()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.any() for parameter in layer.parameters())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in layer.parameters())
    assert created().weight.any()  # outside of the context


@pytest.mark.parametrize(
    ("init", "target"),
    [
        (True, nn.Linear(5, 6)),
        ("olora", nn.Linear(5, 6)),
        ("pissa", nn.Embedding(5, 6).to("meta")),
        ("pissa", nn.Linear(5, 6, device="meta")),
        ("pissa", nn.Identity()),
    ],
)
def test_the_same_random_numbers_where_pissa_writes_nothing(init: Any, target: nn.Module) -> None:
    torch.manual_seed(0)
    expected = created()
    torch.manual_seed(0)
    with creating(config(init), target):
        layer = created()
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(layer.bias, expected.bias)
    assert layer.weight.device.type == "cpu"


def test_the_device_of_the_weight() -> None:
    """A device without arithmetic, in the place of a GPU."""
    weight = nn.Parameter(torch.empty(6, 5))
    target = nn.Linear(5, 6)
    target.weight = weight
    with creating(config("pissa"), target):
        assert torch.empty(1).device == weight.device
    with torch.device("meta"), creating(config("pissa"), target):
        assert created().weight.device == weight.device


class Scaled(nn.Module):
    """A layer that PEFT knows only by what its user registers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 24
        self.weight = nn.Parameter(torch.randn(24, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x @ self.weight.mT


class ScaledLora(nn.Module, LoraLayer):
    """Its adapter, which never asks for an initializer."""

    def __init__(self, base_layer: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.in_features = self.out_features = 24
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, kwargs["r"], kwargs["lora_alpha"], kwargs["config"])

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        plain = copy.copy(config)
        plain.init_lora_weights = True
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=plain, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        A, B = self.lora_A["default"], self.lora_B["default"]
        return self.base_layer(x) + 2 * self.scaling["default"] * B(A(x))


def test_layers_that_stay_plain_are_told_once() -> None:
    model = nn.Sequential(Scaled(), nn.Linear(24, 16), Scaled(), nn.Linear(24, 16))
    before = model[0](torch.ones(1, 24))
    settings = peft.LoraConfig(r=4, target_modules=["0", "1", "2"], init_lora_weights="pissa")
    settings._register_custom_module({Scaled: ScaledLora})
    with pk.patch_peft(progress=False) as report, pytest.warns(UserWarning, match="plain LoRA") as caught:
        adapted = peft.get_peft_model(model, settings)
    told = [str(warning.message) for warning in caught if "plain LoRA" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("layer '0' (ScaledLora), layer '2' (ScaledLora): ")
    assert [layer.name for layer in report.layers] == ["1"]
    assert torch.equal(adapted.base_model.model[0](torch.ones(1, 24)), before)
