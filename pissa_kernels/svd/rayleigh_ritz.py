"""From a subspace to singular triplets, and their residuals measured against the weight."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import HALF_SUBNORMAL
from ..ops.reference import cholesky_qr
from .operators import WeightOperator
from .orthogonalize import orthonormalize
from .result import Certificate, TruncatedSVD

FLOAT32_EPS = torch.finfo(torch.float32).eps
FLOAT32_NORMAL = torch.finfo(torch.float32).smallest_normal


class Triplets(NamedTuple):
    """Singular triplets of each A of a batch, scaled as A is.

    Attributes:
        U: (batch, m, r) float32.
        S: (batch, r) float32, descending.
        V: (batch, n, r) float32.
        residuals: (batch, r) ρᵢ = max(‖A·vᵢ − σᵢ·uᵢ‖, ‖Aᵀ·uᵢ − σᵢ·vᵢ‖), measured in float32.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residuals: Tensor


def gram_triplets(operator: WeightOperator, rank: int, dtype: torch.dtype) -> Triplets:
    """Triplets from the leading eigenvectors of AᵀA, summed and decomposed in ``dtype``."""
    _, vectors = torch.linalg.eigh(operator.gram(dtype))
    return rayleigh_ritz(operator, vectors[:, :, -rank:])


def dense_triplets(operator: WeightOperator, rank: int) -> Triplets:
    """The leading triplets of the full SVD by LAPACK or cuSOLVER, for ranks near n."""
    U, S, Vh = torch.linalg.svd(operator.dense(), full_matrices=False)
    V = Vh[:, :rank].mT.contiguous()
    return _measured(operator, U[:, :, :rank].contiguous(), S[:, :rank], V, operator.apply(V))


def rayleigh_ritz(operator: WeightOperator, V: Tensor, AV: Tensor | None = None) -> Triplets:
    """Triplets of A on the subspace spanned by V: A·V = Q·R, R = X·S·Zᵀ, U = Q·X. Orthonormal even where S is zero.

    Args:
        operator: A.
        V: (batch, n, r), of full rank.
        AV: (batch, m, r) A·V, for a V that is orthonormal up to round-off; None to compute it.
    """
    if AV is None:
        V, _ = orthonormalize(V)
        Y = operator.apply(V)
    else:
        V, change, _, _ = cholesky_qr(V)
        Y = AV @ change
    Q, _ = orthonormalize(Y)
    X, S, Zh = torch.linalg.svd((Q.mT @ Y).double())
    U, Z = (Q @ X.to(Q.dtype)).float(), Zh.mT.to(V.dtype)
    return _measured(operator, U, S.float(), (V @ Z).float(), (Y @ Z).float())


def _measured(operator: WeightOperator, U: Tensor, S: Tensor, V: Tensor, AV: Tensor) -> Triplets:
    left = torch.linalg.vector_norm(AV - U * S.unsqueeze(-2), dim=-2)
    right = torch.linalg.vector_norm(operator.adjoint(U) - V * S.unsqueeze(-2), dim=-2)
    return Triplets(U, S, V, torch.maximum(left, right))


def certified(operator: WeightOperator, triplets: Triplets, converged: list[bool], method: str) -> list[TruncatedSVD]:
    """Triplets of the weights, unscaled and with their certificates, from those of the operator.

    Raises:
        ValueError: singular values beyond float32's range.
    """
    U, V = (triplets.V, triplets.U) if operator.wide else (triplets.U, triplets.V)
    S = triplets.S if operator.scale is None else triplets.S / operator.scale.squeeze(-1)
    captured = triplets.S.double().square().sum(-1)
    figures = torch.stack([triplets.residuals.amax(-1), triplets.S[:, 0], S[:, 0]], dim=-1).tolist()
    results = []
    for index, (residual, largest, unscaled) in enumerate(figures):
        if not math.isfinite(unscaled):
            raise ValueError("the weight's singular values exceed float32's range")
        # round-off of the measurement: float32 products, and A·V computed as Y·Z, sums of r terms
        roundoff = (8 + 2 * math.sqrt(S.shape[1])) * FLOAT32_EPS
        if 0 < unscaled < FLOAT32_NORMAL:  # dividing by the scale rounded S
            roundoff += HALF_SUBNORMAL[torch.float32] / unscaled
        relative = residual / largest + roundoff if largest > 0 else 0.0
        energy = operator.energy[index]
        share = min(float(captured[index]) / energy, 1.0) if energy > 0 else 1.0
        certificate = Certificate(operator.passes, share, relative, converged[index], method)
        results.append(TruncatedSVD(U[index].contiguous(), S[index], V[index].mT.contiguous(), certificate))
    return results
