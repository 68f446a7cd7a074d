"""Checks of an adapted model against the one it was made from, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .numerics import reconstruction


def lora_layers(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of everything that PEFT put a LoRA adapter on."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def captured_energies(original: Any, adapted: nn.Module) -> Tensor:
    """‖W·V̂‖_F² for each layer, V̂ an orthonormal basis of the rows of its A, in float64."""
    energies = []
    for name, layer in lora_layers(adapted):
        weight = original.get_submodule(name).weight.detach().double()
        A = layer.lora_A["default"].weight.detach().double()
        view = weight.mT if layer.fan_in_fan_out else weight
        energies.append((view @ torch.linalg.qr(A.mT)[0]).square().sum())
    return torch.stack(energies)


def worst_reconstruction(original: Any, adapted: nn.Module) -> float:
    """The worst :func:`reconstruction` of any layer of a model."""
    worst = 0.0
    for name, layer in lora_layers(adapted):
        weight, residual = original.get_submodule(name).weight.detach(), layer.get_base_layer().weight.detach()
        if layer.fan_in_fan_out:
            weight, residual = weight.mT, residual.mT
        A, B = (factors["default"].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        worst = max(worst, reconstruction(weight, residual, A, B, layer.scaling["default"]))
    return worst
