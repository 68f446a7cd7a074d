"""Orthonormal panels: CholeskyQR where it is stable, Householder QR elsewhere.

A tall panel Z (n, b), b ≪ n, is orthonormalized through its b×b Gram matrix (CholeskyQR2, Fukaya et al. 2014): matrix
products and a small Cholesky factorization, several times faster than Householder QR on every device. In float32 this
needs cond(Z) < 1/√ε ≈ 3·10³ after the columns are scaled to unit length. If the factorization fails or has a tiny
pivot, the panel goes to Householder QR, which also handles rank-deficient and zero panels.

All functions take batches (batch, n, b). Each decision takes one transfer to the host for the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.reference import project_out

# Smallest pivot of the scaled Gram matrix's Cholesky factor for which CholeskyQR is used. Below it the first round may
# lose orthogonality completely (ε·cond² ≈ 1), and the second cannot restore it.
MIN_PIVOT = 1e-3
# Smallest pivot for which one round is as accurate as two: the columns are nearly orthogonal.
ONE_ROUND_PIVOT = 0.5
# Length of the shortest unit column after a projection above which the basis and the panel are orthogonal already.
ORTHOGONAL_LENGTH = 0.99
MAX_ROUNDS = 6
# Length of a column after a projection, relative to the longest column before it, that is round-off: about √n·ε
# in float32.
ROUNDOFF_LENGTH = 1e-5


def orthonormalize(Z: Tensor, basis: Tensor | None = None, near: Tensor | None = None) -> tuple[Tensor, list[bool]]:
    """Orthonormal basis of the part of span(Z) that is orthogonal to a given basis.

    Block Gram–Schmidt: projections against the basis, each followed by a round of CholeskyQR, until a projection
    removes nothing. Two rounds are enough (Giraud et al. 2005) unless the first leaves only round-off. Round-off can
    point in any direction, also along the basis, and would then carry an orthogonality error of the basis over to the
    next panel, where it grows. If Z together with the basis is rank-deficient, the panel is completed with arbitrary
    directions orthogonal to both.

    Args:
        Z: (batch, n, b) float32 or float64; k + b ≤ n.
        basis: (batch, k, n), orthonormal rows; None for an empty basis.
        near: the rows of ``basis`` that Z is not orthogonal to in exact arithmetic, if they are known: the first
            projection uses only these. None for all rows.

    Returns:
        The panel (batch, n, b), and for each matrix of the batch whether Z was rank-deficient, so that part of the
        panel is arbitrary: completed, or the round-off that a projection has left of a column.
    """
    gram_schmidt = dispatch.bind("gram_schmidt", Z, Z.dtype)
    panel, first, shortest = gram_schmidt(Z, basis if near is None else near)
    roundoff = shortest <= ROUNDOFF_LENGTH * torch.linalg.vector_norm(Z, dim=-2).amax(-1)
    if basis is None and all(pivot > ONE_ROUND_PIVOT for pivot in first.tolist()):
        return panel, [False] * len(Z)
    for number in range(1, MAX_ROUNDS):
        panel, pivot, shortest = gram_schmidt(panel, basis)
        figures = torch.stack([first if number == 1 else pivot, pivot, shortest, roundoff], dim=-1).tolist()
        # a zero column makes the pivot NaN, and NaN > x is False
        stable = [a > MIN_PIVOT and b > MIN_PIVOT for a, b, *_ in figures]
        if not all(stable):
            return _replace_unstable(Z, panel, basis, stable), [not good for good in stable]
        if all(norm > ORTHOGONAL_LENGTH for _, _, norm, _ in figures):
            break
    return panel, [bool(arbitrary) for *_, arbitrary in figures]


def _replace_unstable(Z: Tensor, panel: Tensor, basis: Tensor | None, stable: list[bool]) -> Tensor:
    """Replace the panels where CholeskyQR is unstable by Householder's, and finish the other panels of the batch."""
    bad = [index for index, good in enumerate(stable) if not good]
    panel[bad] = _householder(Z[bad], None if basis is None else basis[bad])
    good = [index for index, good in enumerate(stable) if good]
    if good:  # they may need further rounds, and a round too many does no harm
        panel[good], _ = orthonormalize(panel[good], None if basis is None else basis[good])
    return panel


def _householder(Z: Tensor, basis: Tensor | None) -> Tensor:
    """Orthonormal panel of any Z, completed with random directions where Z and the basis are rank-deficient.

    Householder QR returns arbitrary columns for zero pivots (the same ones each time if Z = 0), which may lie in the
    basis, so random columns replace them. Projection and QR are repeated until a projection removes nothing.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    for _ in range(MAX_ROUNDS):
        panel, factor = torch.linalg.qr(Z)
        pivots = factor.diagonal(dim1=-2, dim2=-1).abs()
        roundoff = 10 * torch.finfo(Z.dtype).eps
        deficient = (pivots <= roundoff * pivots.amax(-1, keepdim=True)).any(-1)
        if deficient.any():
            # the arbitrary column of a zero pivot may have a part of the columns of Z that follow
            change, sizes, _ = torch.linalg.svd(factor)
            panel = torch.where(deficient[:, None, None], panel @ change, panel)
            pivots = torch.where(deficient[:, None], sizes, pivots)
        zero = pivots <= roundoff * pivots.amax(-1, keepdim=True)
        draws = torch.randn(Z.shape[1:], generator=generator, dtype=Z.dtype, device="cpu").to(Z.device)
        Z = project_out(torch.where(zero.unsqueeze(-2), draws, panel), basis)
        norms = torch.linalg.vector_norm(Z, dim=-2)
        if (~zero.any() & (norms.amin() > ORTHOGONAL_LENGTH)).item():
            break
    completed: Tensor = torch.linalg.qr(Z)[0]
    return completed
