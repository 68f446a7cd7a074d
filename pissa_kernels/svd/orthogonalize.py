"""Orthonormal panels: CholeskyQR where it is stable, Householder QR elsewhere.

CholeskyQR is a verb. A panel whose Cholesky factor fails or has a tiny pivot goes to Householder QR, which also handles
rank-deficient and zero panels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.panels import MAX_ROUNDS, MIN_PIVOT, ORTHOGONAL_LENGTH, project_out

# Length of a column after a projection, relative to the longest column before it, that is round-off: about √n·ε
# in float32.
ROUNDOFF_LENGTH = 1e-5


def orthonormalize(Z: Tensor, basis: Tensor | None = None, near: int = 0) -> tuple[Tensor, bool]:
    """Orthonormal basis of the part of span(Z) that is orthogonal to a given basis.

    See :func:`pissa_kernels.ops.orthonormalize`. If Z together with the basis is rank-deficient, the panel is completed
    with arbitrary directions orthogonal to both.

    Args:
        Z: (n, b) float32 or float64; k + b ≤ n.
        basis: (k, n), orthonormal rows; None for an empty basis.
        near: first of the rows of ``basis`` that Z is not orthogonal to in exact arithmetic, if that is known.

    Returns:
        The panel (n, b), and whether Z was rank-deficient, so that part of the panel is arbitrary: completed, or the
        round-off that a projection has left of a column.
    """
    panel, figures = dispatch.bind("orthonormalize", Z, Z.dtype)(Z, basis, near)
    first, last, kept = figures.tolist()
    if first > MIN_PIVOT and last > MIN_PIVOT:  # not if one is NaN
        return panel, kept <= ROUNDOFF_LENGTH
    return _householder(Z, basis), True


def _householder(Z: Tensor, basis: Tensor | None) -> Tensor:
    """Orthonormal panel of any Z, completed with random directions where Z and the basis are rank-deficient.

    Householder QR returns arbitrary columns for zero pivots (the same ones each time if Z = 0), which may lie in the
    basis, so random columns replace them. Projection and QR are repeated until a projection removes nothing.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    for _ in range(MAX_ROUNDS):
        panel, factor = torch.linalg.qr(Z)
        pivots = factor.diagonal().abs()
        roundoff = 10 * torch.finfo(Z.dtype).eps
        if (pivots <= roundoff * pivots.amax()).any():
            # the arbitrary column of a zero pivot may have a part of the columns of Z that follow
            change, pivots, _ = torch.linalg.svd(factor)
            panel = panel @ change
        zero = pivots <= roundoff * pivots.amax()
        draws = torch.randn(Z.shape, generator=generator, dtype=Z.dtype, device="cpu").to(Z.device)
        Z = torch.where(zero, draws, panel)
        Z = Z if basis is None else project_out(Z, basis)
        if not zero.any() and bool(torch.linalg.vector_norm(Z, dim=0).amin() > ORTHOGONAL_LENGTH):
            break
    completed: Tensor = torch.linalg.qr(Z)[0]
    return completed
