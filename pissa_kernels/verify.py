"""Checks of an adapted model against the one it was made from, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Elements that are held in float64 at a time.
BLOCK_ELEMENTS = 1 << 18
# Unit roundoff of each storage dtype: half a unit in the last place, relative.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


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


def reconstruction(weight: Tensor, residual: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """Worst |W − (W_res + s·B·A)| of any element, over what rounding allows it; Inf where anything is not finite.

    Allowed are the one rounding of the residual to its dtype, u·|W_res|, and the float32 product before it,
    (r + 2)·2⁻²⁴ times (|W| + s·|B|·|A|) (Higham 2002, §3.1). In float64, some rows at a time.

    Args:
        weight, residual: (out, in), of one dtype.
        lora_A, lora_B: (r, in) and (out, r).
        scaling: s.
    """
    u = UNIT_ROUNDOFF[residual.dtype]
    smallest = torch.finfo(residual.dtype).smallest_normal * u  # absolute floor: subnormal residuals
    A, B = lora_A.double(), lora_B.double()
    worst = 0.0
    for start in range(0, len(weight), rows := max(1, BLOCK_ELEMENTS // weight.shape[1])):
        W, R = weight[start : start + rows].double(), residual[start : start + rows].double()
        left = scaling * B[start : start + rows]
        product = (A.shape[0] + 2) * 2.0**-24 * (W.abs() + left.abs() @ A.abs())
        error = (W - R - left @ A).abs()
        block = float((error / (u * R.abs() * (1 + u) + product + smallest)).max())
        worst = max(worst, block if math.isfinite(block) else math.inf)
    return worst
