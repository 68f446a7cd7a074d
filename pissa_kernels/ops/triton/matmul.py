"""The verbs W·X and Wᵀ·Y, of one weight or of a stack, as products of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batched import Weights
from .product import product


def matmul(weight: Tensor, X: Tensor, pieces: int = 3) -> Tensor:
    """W·X. See :func:`pissa_kernels.ops.matmul`."""
    if weight.ndim == 2:
        return matmul(weight[None], X[None], pieces)[0]
    result = product(Weights.of(weight.unbind()), X, precision=pieces).values
    assert result is not None
    return result


def rmatmul(weight: Tensor, Y: Tensor, pieces: int = 3) -> Tensor:
    """Wᵀ·Y. See :func:`pissa_kernels.ops.rmatmul`."""
    return matmul(weight.mT, Y, pieces)


def normal(weight: Tensor, X: Tensor, pieces: int = 3) -> tuple[Tensor, Tensor]:
    """W·X and Wᵀ·W·X, with two reads of W. See :func:`pissa_kernels.ops.normal`."""
    if weight.ndim == 2:
        Y, Z = normal(weight[None], X[None], pieces)
        return Y[0], Z[0]
    weights = Weights.of(weight.unbind())
    images = product(weights, X, precision=pieces, pieces=pieces if weight.dtype == torch.bfloat16 else 0)
    result = product(weights.mT, images, precision=pieces).values
    assert images.values is not None
    assert result is not None
    return images.values, result
