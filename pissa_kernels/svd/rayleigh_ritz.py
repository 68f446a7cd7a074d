"""From a subspace to singular triplets, and their residuals measured against the weight."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import HALF_SUBNORMAL
from ..ops.panels import resolved, triplets_from
from .operators import ScaledOperator
from .orthogonalize import orthonormalize
from .result import Certificate, TruncatedSVD

FLOAT32_EPS = torch.finfo(torch.float32).eps
FLOAT32_NORMAL = torch.finfo(torch.float32).smallest_normal


class Triplets(NamedTuple):
    """Singular triplets of A, scaled as A is.

    Attributes:
        U: (m, r) float32.
        S: (r,) float32, descending.
        V: (n, r) float32.
        residuals: (r,) ρᵢ = max(‖A·vᵢ − σᵢ·uᵢ‖, ‖Aᵀ·uᵢ − σᵢ·vᵢ‖), measured in float32.
        following: (b − r,) float32, the other singular values of A on the b-dimensional subspace that these are from.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residuals: Tensor
    following: Tensor


def gram_triplets(operator: ScaledOperator, rank: int, dtype: torch.dtype) -> Triplets:
    """Triplets from the leading eigenvectors of AᵀA, summed and decomposed in ``dtype``."""
    _, vectors = torch.linalg.eigh(operator.gram(dtype))
    return rayleigh_ritz(operator, vectors[:, -rank:], rank)


def dense_triplets(operator: ScaledOperator, rank: int) -> Triplets:
    """The leading triplets of the full SVD by LAPACK or cuSOLVER, for ranks near n."""
    U, S, Vh = torch.linalg.svd(operator.dense(), full_matrices=False)
    V = Vh[:rank].mT.contiguous()
    U, S = U[:, :rank].contiguous(), S[:rank]
    return Triplets(U, S, V, operator.residuals(U, S, V, operator.apply(V)), S[:0])


def rayleigh_ritz(operator: ScaledOperator, V: Tensor, rank: int, AV: Tensor | None = None) -> Triplets:
    """The leading triplets of A on the range of V, orthonormal even where S is zero.

    Args:
        operator: A.
        V: (n, b), b ≥ r, of full rank.
        rank: r.
        AV: (m, b) A·V, for a V that is orthonormal up to round-off; None to compute it.

    Raises:
        torch.linalg.LinAlgError: the SVD failed.
    """
    U, right, figures = operator.triplets(V, rank, AV)
    if resolved(figures[-2:]):
        triplets = as_triplets(U, right, figures)
    else:
        Q, _ = orthonormalize(V)
        Y = operator.apply(Q)
        U, S, right, residuals = triplets_from(orthonormalize(Y)[0], Y, Q, rank, operator.adjoint)
        triplets = Triplets(*(factor.float() for factor in (U, S[:rank], right, residuals, S[rank:])))
    if bool(triplets.S[0].isnan()):
        raise torch.linalg.LinAlgError("the SVD failed")  # type: ignore[attr-defined]
    return triplets


def as_triplets(U: Tensor, V: Tensor, figures: Tensor) -> Triplets:
    """The triplets that :func:`pissa_kernels.ops.reference.triplets` has returned."""
    rank, figures = U.shape[1], figures.float()
    columns = len(figures) - rank - 2
    return Triplets(U.float(), figures[:rank], V.float(), figures[columns:-2], figures[rank:columns])


def certified(operator: ScaledOperator, triplets: Triplets, converged: bool, method: str) -> TruncatedSVD:
    """Triplets of the weight, unscaled and with their certificate, from those of the operator.

    Raises:
        ValueError: singular values beyond float32's range.
    """
    U, V = (triplets.V, triplets.U) if operator.wide else (triplets.U, triplets.V)
    S = triplets.S if operator.scale == 1.0 else triplets.S / operator.scale
    values, residual, unscaled = triplets.S.tolist(), float(triplets.residuals.amax()), float(S[0])
    largest = values[0]
    if not math.isfinite(unscaled):
        raise ValueError("the weight's singular values exceed float32's range")
    # round-off of the measurement: float32 products, and A·V computed as Y·Z, sums of r terms
    roundoff = (8 + 2 * math.sqrt(len(S))) * FLOAT32_EPS
    if 0 < unscaled < FLOAT32_NORMAL:  # dividing by the scale rounded S
        roundoff += HALF_SUBNORMAL[torch.float32] / unscaled
    relative = residual / largest + roundoff if largest > 0 else 0.0
    share = min(sum(value * value for value in values) / operator.energy, 1.0) if operator.energy > 0 else 1.0
    certificate = Certificate(operator.passes, share, relative, converged, method)
    return TruncatedSVD(U.contiguous(), S, V.mT.contiguous(), certificate)
