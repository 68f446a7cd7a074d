"""Checks of an adapted model against the one it was made from, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Unit roundoff of each storage dtype: half a unit in the last place, relative.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def lora_layers(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of everything that PEFT put a LoRA adapter on."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def _weights(original: Any, adapted: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """(W, W_res, A, B, s) of every adapted layer, W (out, in), in float64."""
    for name, layer in lora_layers(adapted):
        weight = original.get_submodule(name).weight.detach().double()
        residual = layer.get_base_layer().weight.detach().double()
        if layer.fan_in_fan_out:
            weight, residual = weight.mT, residual.mT
        A, B = (factors["default"].weight.detach().double() for factors in (layer.lora_A, layer.lora_B))
        yield weight, residual, A, B, layer.scaling["default"]


def captured_energies(original: Any, adapted: nn.Module) -> Tensor:
    """‖W·V̂‖_F² for each layer, V̂ an orthonormal basis of the rows of its A, in float64."""
    return torch.stack([(W @ torch.linalg.qr(A.mT)[0]).square().sum() for W, _, A, _, _ in _weights(original, adapted)])


def worst_reconstruction(original: Any, adapted: nn.Module) -> float:
    """Worst |W − (W_res + s·B·A)| of any element of any layer, over what rounding allows it.

    Allowed are the one rounding of the residual to its dtype, u·|W_res|, and the float32 product before it,
    (r + 2)·2⁻²⁴ times (|W| + s·|B|·|A|) (Higham 2002, §3.1).
    """
    worst = 0.0
    for W, residual, A, B, scaling in _weights(original, adapted):
        u = UNIT_ROUNDOFF[original.dtype]
        product = (A.shape[0] + 2) * 2.0**-24 * (W.abs() + scaling * B.abs() @ A.abs())
        smallest = torch.finfo(original.dtype).smallest_normal * u  # absolute floor: subnormal residuals
        error = (W - residual - scaling * B @ A).abs()
        worst = max(worst, float((error / (u * residual.abs() * (1 + u) + product + smallest)).max()))
    return worst
