"""Adapters that PiSSA will overwrite are created as zeros; all others as PEFT creates them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

import pissa_kernels as pk
from pissa_kernels.peft.creation import creating


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
        ("pissa", nn.Conv2d(3, 4, 2)),
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


def test_layers_that_stay_plain_get_random_numbers() -> None:
    model = nn.Sequential(nn.Embedding(7, 24), nn.Linear(24, 16))
    settings = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights="pissa")
    with pk.patch_peft(progress=False), pytest.warns(UserWarning, match="Embedding|embedding|plain"):
        adapted = peft.get_peft_model(model, settings)
    layer = adapted.base_model.model[0]
    assert layer.lora_embedding_B["default"].any() or layer.lora_embedding_A["default"].any()
