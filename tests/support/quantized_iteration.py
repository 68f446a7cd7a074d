"""The iteration with exact SVDs. Nothing here calls the package but a scheme that is handed in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def exact_errors(
    weight: Tensor,
    rank: int,
    scaling: float,
    scheme: Any,
    iterations: int,
    *,
    noise: float = 0.0,
    seed: int = 0,
) -> list[float]:
    """‖W − W_q − s·B·A‖_F after each iteration, with float64 SVDs, and A and B rounded to the weight's dtype.

    Args:
        weight: (m, n).
        rank: r.
        scaling: s.
        scheme: quantizer.
        iterations: number of iterations.
        noise: standard deviation of a perturbation of each matrix before its SVD, relative to the matrix's own.
        seed: of the perturbation.
    """
    exact, left, errors = weight.double(), weight.double(), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        if noise:
            drawn = torch.randn(left.shape, generator=generator, dtype=torch.float64)
            left = left + noise * left.std() * drawn
        U, S, Vh = torch.linalg.svd(left, full_matrices=False)
        root = (S[:rank] / scaling).sqrt()
        A, B = ((root[:, None] * Vh[:rank]).to(weight.dtype), (U[:, :rank] * root).to(weight.dtype))
        residual = exact - scaling * (B.double() @ A.double())
        values = scheme.quantize(residual.float(), weight.dtype).dequantize().double()
        errors.append(float((residual - values).norm()))
        left = exact - values
    return errors


def plain_error(weight: Tensor, scheme: Any) -> Tensor:
    """W − Q(W), float64."""
    values: Tensor = scheme.quantize(weight.float().contiguous(), weight.dtype).dequantize().double()
    return weight.double() - values
