"""What a truncated SVD returns: the triplets and their certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Certificate:
    """What is known of a truncated SVD without a reference.

    Attributes:
        passes: products with W or Wᵀ, the measurement of the residual included.
        energy: Σσ̂²/‖W‖_F², the share of W's energy that the triplets capture; 1 for a zero matrix.
        residual: max ρ/σ₁ with ρᵢ = max(‖W·vᵢ − σᵢ·uᵢ‖, ‖Wᵀ·uᵢ − σᵢ·vᵢ‖): the triplets are the exact ones of a matrix
            within √2·max ρ of W. Measured in float32, with that measurement's own rounding added.
        converged: the energy deficit, estimated from the residuals, is below the tolerance, or a dense method answered.
            Where singular values cluster across index r the estimate may be short by a factor of two or three, at
            tolerances between 1e-5 and 1e-3 by one of ten: half a dozen values within 1 % suffice there.
        method: "krylov" or "chebyshev", or "gram" and "svd" for the two dense ones.
    """

    passes: int
    energy: float
    residual: float
    converged: bool
    method: str


class TruncatedSVD(NamedTuple):
    """W ≈ U·diag(S)·Vh: U (m, r), S (r,) descending, Vh (r, n), float32, contiguous, on W's device."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    certificate: Certificate
