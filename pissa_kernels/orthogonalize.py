"""Orthonormal panels: CholeskyQR where it is safe, Householder where it is not.

A tall panel Z (n, b), b ≪ n, is orthonormalised through its b×b Gram matrix (CholeskyQR2, Fukaya et al. 2014):
matrix products and a small Cholesky factorisation, several times faster than Householder QR on every device.
In float32 it needs cond(Z) < 1/√ε ≈ 3·10³ after its columns are scaled to unit length; a factor that fails or
shows a tiny pivot sends the panel to Householder QR, which also takes rank-deficient and zero panels.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Smallest pivot of the scaled Gram matrix's factor that one CholeskyQR round is trusted with: below it the first
# round may lose orthogonality altogether (ε·cond² ≈ 1), and the second could not bring it back.
MIN_PIVOT = 1e-3
# A projection that leaves unit columns this long has found next to nothing along the basis.
SETTLED = 0.99
MAX_ROUNDS = 6


def cholesky_qr(Z: Tensor) -> tuple[Tensor | None, float]:
    """One CholeskyQR round of Z (n, b), or None where Z is too ill-conditioned, and Z's shortest column norm."""
    gram = Z.mT @ Z
    norms = gram.diagonal().sqrt()
    factor, info = torch.linalg.cholesky_ex(gram / (norms[:, None] * norms))
    # one transfer for the whole decision; a zero column makes NaN, and NaN > x is False
    failed, pivot, shortest = torch.stack([info.to(Z.dtype), factor.diagonal().min(), norms.min()]).tolist()
    if failed or not pivot > MIN_PIVOT:
        return None, shortest
    return torch.linalg.solve_triangular(factor.mT, Z / norms, upper=True, left=False), shortest


def orthonormalize(Z: Tensor, basis: Tensor | None = None) -> tuple[Tensor, bool]:
    """Orthonormal columns that span what Z adds to a basis.

    Block Gram–Schmidt, each projection followed by a CholeskyQR round, until a projection removes nothing. Two are
    enough (Giraud et al. 2005) unless the first left only rounding noise: that may lie anywhere, along the basis too,
    and an orthogonality error of the basis would then pass undiminished, and grow, from panel to panel. Where Z is
    rank-deficient against the basis, arbitrary directions orthogonal to everything else fill the panel.

    Args:
        Z: (n, b) float32 or float64; k + b ≤ n.
        basis: (k, n), orthonormal rows, or None.

    Returns:
        The panel (n, b), and whether Z was deficient, so that part of the panel is arbitrary.
    """
    for number in range(MAX_ROUNDS):
        Z = _project_out(Z, basis)
        panel, shortest = cholesky_qr(Z)
        if panel is None:
            return _fill(Z, basis), True
        Z = panel
        if number > 0 and shortest > SETTLED:
            break
    return Z, False


def _project_out(Z: Tensor, basis: Tensor | None) -> Tensor:
    return Z if basis is None or not len(basis) else torch.addmm(Z, basis.mT, basis @ Z, alpha=-1)


def _fill(Z: Tensor, basis: Tensor | None) -> Tensor:
    # Householder QR takes any Z, but its columns for zero pivots are arbitrary (for Z = 0 the same ones each time) and
    # may lie along the basis: those are drawn anew. What is left is projected and renormalised until the projection
    # removes nothing.
    generator = torch.Generator(device="cpu").manual_seed(0)
    for _ in range(MAX_ROUNDS):
        panel, factor = torch.linalg.qr(Z)
        pivots = factor.diagonal().abs()
        missing = pivots <= 10 * torch.finfo(Z.dtype).eps * pivots.max()
        draws = torch.randn(Z.shape, generator=generator, dtype=Z.dtype, device="cpu").to(Z.device)
        Z = _project_out(torch.where(missing, draws, panel), basis)
        if not missing.any().item() and torch.linalg.vector_norm(Z, dim=0).min().item() > SETTLED:
            break
    filled: Tensor = torch.linalg.qr(Z)[0]
    return filled
