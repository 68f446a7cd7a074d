"""The values of an adapter in one of PEFT's LoRA layers, in float64, and their weighted sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A and B of an adapter, in float64."""
    return layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()


def product(layer: Any, name: str) -> Tensor:
    """B·A (out, in) of an adapter, in float64."""
    A, B = factors(layer, name)
    return B @ A


def magnitude_of(layer: Any, name: str) -> Tensor | None:
    """DoRA's magnitudes (out,) of an adapter in float64, or None."""
    if name not in layer.lora_magnitude_vector:
        return None
    return layer.lora_magnitude_vector[name].weight.detach().double().clone()  # type: ignore[no-any-return]


def combined(terms: list[tuple[float, Tensor, Tensor]], kind: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a weighted sum of adapters (s, A, B): exact, or for "linear" PEFT's sums of the factors."""
    if not terms:
        return like.new_zeros(0, like.shape[1]), like.new_zeros(like.shape[0], 0)
    if kind == "linear":
        return sum(s**0.5 * A for s, A, _ in terms), sum(s**0.5 * B for s, _, B in terms)  # type: ignore[return-value]
    return torch.cat([s * A for s, A, _ in terms]), torch.cat([B for _, _, B in terms], dim=1)
