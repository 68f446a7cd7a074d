"""Orthonormal panels: CholeskyQR twice where it is safe, Householder where it is not.

A tall panel Z (n, b), b ≪ n, is orthonormalised through its b×b Gram matrix (CholeskyQR2, Fukaya et al. 2014):
two matrix products and a small Cholesky factorisation, several times faster than Householder QR on every device.
In float32 it needs cond(Z) < 1/√ε ≈ 3·10³ after its columns are scaled to unit length; a factor that fails or
shows a tiny pivot sends the panel to Householder QR, which also takes rank-deficient and zero panels.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Smallest pivot of the scaled Gram matrix's factor that one CholeskyQR round is trusted with: below it the first
# round may lose orthogonality altogether (ε·cond² ≈ 1), and the second could not bring it back.
MIN_PIVOT = 1e-3


def cholesky_qr(Z: Tensor) -> Tensor | None:
    """One CholeskyQR round of Z (n, b), or None where Z is too ill-conditioned for it."""
    gram = Z.mT @ Z
    norms = gram.diagonal().sqrt()
    gram = gram / (norms[:, None] * norms)
    factor, info = torch.linalg.cholesky_ex(gram)
    safe = (info == 0) & (factor.diagonal().min() > MIN_PIVOT)  # a zero column makes NaN, and NaN > x is False
    if not safe.item():
        return None
    return torch.linalg.solve_triangular(factor.mT, Z / norms, upper=True, left=False)


def orthonormalize(Z: Tensor, basis: Tensor | None = None) -> tuple[Tensor, bool]:
    """Orthonormal columns that span what Z adds to a basis.

    Block Gram–Schmidt is run twice ("twice is enough", Giraud et al. 2005), each time with a CholeskyQR round, so that
    the result is orthogonal to the basis and within itself to float32 rounding. Where Z is rank-deficient against the
    basis, the missing directions are filled with arbitrary ones orthogonal to everything else.

    Args:
        Z: (n, b) float32 or float64; k + b ≤ n.
        basis: (k, n), orthonormal rows, or None.

    Returns:
        The panel (n, b), and whether Z was deficient, so that part of the panel is arbitrary.
    """
    for _ in range(2):
        Z = _project_out(Z, basis)
        panel = cholesky_qr(Z)
        if panel is None:
            return _fill(Z, basis), True
        Z = panel
    return Z, False


def _project_out(Z: Tensor, basis: Tensor | None) -> Tensor:
    return Z if basis is None or not len(basis) else torch.addmm(Z, basis.mT, basis @ Z, alpha=-1)


def _fill(Z: Tensor, basis: Tensor | None) -> Tensor:
    # Householder QR takes any Z, but its columns for zero pivots are arbitrary (for Z = 0 the same ones each time) and
    # may lie along the basis: those are drawn anew. What is left is projected and renormalised until the projection
    # changes nothing, because a panel of rounding noise may point anywhere.
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        panel, factor = torch.linalg.qr(Z)
        pivots = factor.diagonal().abs()
        missing = pivots <= 10 * torch.finfo(Z.dtype).eps * pivots.max()
        draws = torch.randn(Z.shape, generator=generator, dtype=Z.dtype, device="cpu").to(Z.device)
        Z = _project_out(torch.where(missing, draws, panel), basis)
        norms = torch.linalg.vector_norm(Z, dim=0)
        if not missing.any().item() and norms.min().item() > 0.9:
            break
    return torch.linalg.qr(Z)[0]
