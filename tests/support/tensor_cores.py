"""The products of a GPU's tensor cores, emulated: sums of 16 exact products, truncated when they are accumulated.

Tensor cores add up to 16 products exactly and round the sum toward zero (Fasi, Higham, Mikaitis & Pranesh 2021,
"Numerical behavior of NVIDIA tensor cores"). The kernels accumulate one piece without interruption, and restart the
accumulator of two and three pieces every 64 inner elements.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pissa_kernels.ops import batched_reference
from pissa_kernels.ops.batched import Panel, Weights

DEPTH = 16
RESTART = 64


def body() -> SimpleNamespace:
    """The operations on batches, with products of bfloat16 weights as tensor cores compute them."""
    names = ("inverse_cholesky", "eigh", "sum_of_squares", "subtract_lowrank_", "split")
    others = {name: getattr(batched_reference, name) for name in names}
    return SimpleNamespace(product=product, **others)


def product(left: Weights | Tensor, right: Panel | Tensor, **options: Any) -> Panel:
    if not (isinstance(left, Weights) and left.dtype == torch.bfloat16 and isinstance(right, Panel)):
        return batched_reference.product(left, right, **options)
    assert right.pieces is not None
    precision = options.pop("precision")
    totals = [
        truncated(weight.double(), right.pieces[:precision, index].double())
        for index, weight in enumerate(left.tensors)
    ]
    return batched_reference.finished(torch.stack(totals), **options)


def truncated(weight: Tensor, pieces: Tensor) -> Tensor:
    """W·(X₁ + X₂ + …) (m, k) float32, of a weight (m, n) and pieces (p, n, k) in float64, smallest piece first."""
    m, n = weight.shape
    total = torch.zeros(m, pieces.shape[-1])
    restart = RESTART if len(pieces) > 1 else n
    for start in range(0, n, restart):
        part = torch.zeros_like(total)
        for piece in pieces.flip(0):
            for first in range(start, min(start + restart, n), DEPTH):
                inner = slice(first, min(first + DEPTH, start + restart, n))
                part = toward_zero(part.double() + weight[:, inner] @ piece[inner])
        total = part if restart == n else total + part
    return total


def toward_zero(values: Tensor) -> Tensor:
    """float64 values as float32, rounded toward zero."""
    nearest = values.float()
    beyond = nearest.double().abs() > values.abs()
    return torch.where(beyond, torch.nextafter(nearest, torch.zeros(())), nearest)
