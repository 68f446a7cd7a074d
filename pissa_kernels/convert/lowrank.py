"""The change ΔW = s·(B·A − B₀·A₀) that training made, as one product of two factors: exact, or truncated to a rank.

Everything here is without the scaling, that is, ΔW/s, and of all matrices of a layer: one of most layers, one an expert
of fused experts, one a group of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FactorPair:
    """The trained and the initial factors of one layer, each in the dtype of its file.

    Attributes:
        A, B: trained factors, (p, r, in) and (p, out, r) of p matrices.
        A0, B0: initial factors, of the same shapes.
    """

    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor

    def matrices(self) -> Iterator[FactorPair]:
        """The factors of each matrix, with (r, in) and (out, r)."""
        for factors in zip(self.A, self.B, self.A0, self.B0, strict=True):
            yield FactorPair(*factors)

    def finite(self) -> bool:
        return all(bool(factor.isfinite().all()) for factor in (self.A, self.B, self.A0, self.B0))

    def untrained(self) -> bool:
        return torch.equal(self.A, self.A0) and torch.equal(self.B, self.B0)


@dataclass(frozen=True, eq=False)
class Product:
    """The factors of B'·A' ≈ ΔW/s.

    Attributes:
        A, B: A' and B', (p, K, in) and (p, out, K) of p matrices.
        norm: ‖ΔW/s‖_F of all matrices together; NaN for stacked factors, whose error is 0.
        error: ‖ΔW/s − B'·A'‖_F of all matrices together, before A' and B' are rounded to their dtype.
    """

    A: Tensor
    B: Tensor
    norm: float
    error: float


def stacked(factors: FactorPair) -> Product:
    """The stacked factors [A; A₀] and [B, −B₀], exact, of rank 2r, in a dtype that represents all four exactly."""
    dtype = reduce(torch.promote_types, [factor.dtype for factor in (factors.A, factors.B, factors.A0, factors.B0)])
    return Product(
        A=torch.cat([factors.A.to(dtype), factors.A0.to(dtype)], dim=1),
        B=torch.cat([factors.B.to(dtype), -factors.B0.to(dtype)], dim=2),
        norm=float("nan"),
        error=0.0,
    )


def truncated(factors: FactorPair, rank: int) -> Product:
    """The nearest products of rank K in the Frobenius norm (Eckart and Young 1936), computed in float64.

    ΔW/s of a matrix is a product of two thin ones, so its SVD is that of the product of their R factors. Each new
    factor gets √σ, as in PiSSA.

    Args:
        factors: factors of one layer.
        rank: K of each matrix. Zeros fill the factors beyond the smaller side of ΔW.

    Returns:
        A' and B' in float32 for every dtype of the adapter: rounding to bf16 often costs more than the truncation.
    """
    parts, out, width = len(factors.A), factors.B.shape[1], factors.A.shape[2]
    new_A, new_B = factors.A.new_zeros(parts, rank, width).float(), factors.B.new_zeros(parts, out, rank).float()
    norms, errors = [], []
    for part, matrix in enumerate(factors.matrices()):
        left, right = _change(matrix)
        Q_left, R_left = torch.linalg.qr(left)
        Q_right, R_right = torch.linalg.qr(right.mT)
        U, sigma, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
        kept = min(rank, len(sigma))
        root = sigma[:kept].sqrt()
        new_A[part, :kept] = root[:, None] * (Vh[:kept] @ Q_right.mT)
        new_B[part, :, :kept] = (Q_left @ U[:, :kept]) * root
        norms.append(float(sigma.norm()))
        errors.append(float(sigma[kept:].norm()))
    return Product(new_A, new_B, norm=math.hypot(*norms), error=math.hypot(*errors))


def change_norm(factors: FactorPair) -> float:
    """‖ΔW/s‖_F of all matrices together, in float64."""
    changes = (_change(matrix) for matrix in factors.matrices())
    return math.hypot(
        *(float((torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT).norm()) for left, right in changes)
    )


def _change(factors: FactorPair) -> tuple[Tensor, Tensor]:
    """Two matrices (out, 2r) and (2r, in) whose product is ΔW/s of one matrix, in float64.

    (B − B₀)·A + B₀·(A − A₀): with [B, −B₀]·[A; A₀], B·A and B₀·A₀ would cancel if training has changed them little.
    """
    A, B, A0, B0 = (factor.double() for factor in (factors.A, factors.B, factors.A0, factors.B0))
    return torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0], dim=0)
