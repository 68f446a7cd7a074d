"""The change that training made, ΔW/s = B·A − B₀·A₀, as one product of two factors, whole or of lower rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FactorPair:
    """What one layer was trained to, and what it began with; each pair in the dtype that its file has.

    Attributes:
        A, B: (r, in) and (out, r).
        A0, B0: of the same shapes.
    """

    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor

    def finite(self) -> bool:
        return all(bool(factor.isfinite().all()) for factor in (self.A, self.B, self.A0, self.B0))

    def untrained(self) -> bool:
        return torch.equal(self.A, self.A0) and torch.equal(self.B, self.B0)


@dataclass(frozen=True, eq=False)
class Product:
    """Two factors, and what they leave out.

    Attributes:
        A, B: (K, in) and (out, K), contiguous.
        norm: ‖B·A − B₀·A₀‖_F; nan where it was not asked for.
        lost: ‖(B·A − B₀·A₀) − B'·A'‖_F, the roundings of A' and B' not counted.
    """

    A: Tensor
    B: Tensor
    norm: float
    lost: float


def whole(factors: FactorPair) -> Product:
    """[A; A₀] and [B, −B₀], which is exact, in a dtype that holds all four."""
    dtype = reduce(torch.promote_types, [factor.dtype for factor in (factors.A, factors.B, factors.A0, factors.B0)])
    return Product(
        A=torch.cat([factors.A.to(dtype), factors.A0.to(dtype)], dim=0),
        B=torch.cat([factors.B.to(dtype), -factors.B0.to(dtype)], dim=1),
        norm=float("nan"),
        lost=0.0,
    )


def best(factors: FactorPair, rank: int) -> Product:
    """The nearest product of a lower rank (Eckart and Young 1936), √σ on either side, computed in float64.

    Args:
        factors: of one layer.
        rank: K of the result; what ΔW has not is filled up with zeros.

    Returns:
        A' and B' in float32, however coarse the dtype of the adapter: the rounding to bf16 costs more than many a tail.
    """
    A, B, A0, B0 = (factor.double() for factor in (factors.A, factors.B, factors.A0, factors.B0))
    # the same as [B, −B₀] and [A; A₀], without the cancellation of B·A against B₀·A₀ when they have hardly moved
    left, right = torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0], dim=0)
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    U, sigma, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    kept = min(rank, len(sigma))
    root = sigma[:kept].sqrt()
    new_A, new_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(B.shape[0], rank)
    new_A[:kept] = root[:, None] * (Vh[:kept] @ Q_right.mT)
    new_B[:, :kept] = (Q_left @ U[:, :kept]) * root
    return Product(new_A.float(), new_B.float(), float(sigma.norm()), float(sigma[kept:].norm()))
