"""Result of a truncated SVD: the triplets and their certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Certificate:
    """Measured accuracy of a truncated SVD. It needs no reference.

    Attributes:
        passes: number of products with W or Wᵀ, including those that measure the residual.
        energy: Σσ̂²/‖W‖_F², the share of W's energy that the triplets capture; 1 for a zero matrix.
        residual: max ρ/σ₁ with ρᵢ = max(‖W·vᵢ − σᵢ·uᵢ‖, ‖Wᵀ·uᵢ − σᵢ·vᵢ‖). The triplets are exact triplets of a matrix
            within √2·max ρ of W. Measured in float32; includes an upper bound on the round-off of the measurement.
        converged: whether the energy deficit, estimated from the residuals, is at most the tolerance; always true for
            the dense methods. It is an estimate and no proof: where singular values cluster around index r, the true
            deficit is usually up to three times the estimate, and seldom more than ten times.
        method: "krylov" or "chebyshev"; "fixed", the schedule for GPUs; or one of the dense methods "gram" and "svd".

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> W = torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0]))
        >>> certificate = pk.truncated_svd(W, rank=1).certificate
        >>> certificate.method, certificate.converged
        ('svd', True)
        >>> round(certificate.energy, 6)  # 4²/(4² + 3²)
        0.64
    """

    passes: int
    energy: float
    residual: float
    converged: bool
    method: str


class TruncatedSVD(NamedTuple):
    """W ≈ U·diag(S)·Vh, all float32, contiguous, on W's device.

    Attributes:
        U: (m, r), orthonormal columns.
        S: (r,), descending.
        Vh: (r, n), orthonormal rows.
        certificate: measured accuracy.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> W = torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0]))
        >>> U, S, Vh, certificate = pk.truncated_svd(W, rank=2)
        >>> bool(torch.allclose((U * S) @ Vh, W, atol=1e-5))
        True
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    certificate: Certificate
