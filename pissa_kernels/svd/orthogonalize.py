"""Orthonormal panels: CholeskyQR where it is safe, Householder where it is not.

A tall panel Z (n, b), b ≪ n, is orthonormalised through its b×b Gram matrix (CholeskyQR2, Fukaya et al. 2014):
matrix products and a small Cholesky factorisation, several times faster than Householder QR on every device. In
float32 it needs cond(Z) < 1/√ε ≈ 3·10³ after its columns are scaled to unit length; a factor that fails or
shows a tiny pivot sends the panel to Householder QR, which also takes rank-deficient and zero panels.

Everything works on stacks (batch, n, b), and every decision is one transfer to the host for the whole stack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.reference import project_out

# Smallest pivot of the scaled Gram matrix's factor that one CholeskyQR round is trusted with: below it the first
# round may lose orthogonality altogether (ε·cond² ≈ 1), and the second could not bring it back.
MIN_PIVOT = 1e-3
# Smallest pivot for which one round is as good as two: the columns were nearly orthogonal to begin with.
EASY_PIVOT = 0.5
# A projection that leaves unit columns this long has found next to nothing along the basis.
SETTLED = 0.99
MAX_ROUNDS = 6
# What a projection leaves of a column, relative to the longest, and is rounding: some √n·ε in float32.
NOISE = 1e-5


def orthonormalize(Z: Tensor, basis: Tensor | None = None, near: Tensor | None = None) -> tuple[Tensor, list[bool]]:
    """Orthonormal columns that span what Z adds to a basis.

    Block Gram–Schmidt, each projection followed by a CholeskyQR round, until a projection removes nothing. Two are
    enough (Giraud et al. 2005) unless the first left only rounding noise: that may lie anywhere, along the basis too,
    and an orthogonality error of the basis would then pass undiminished, and grow, from panel to panel. Where Z is
    rank-deficient against the basis, arbitrary directions orthogonal to everything else fill the panel.

    Args:
        Z: (batch, n, b) float32 or float64; k + b ≤ n.
        basis: (batch, k, n), orthonormal rows, or None.
        near: the rows of the basis that Z overlaps in exact arithmetic, where that is known: the first projection is
            onto these alone.

    Returns:
        The panel (batch, n, b), and for each of the stack whether Z was deficient, so that part of the panel is
        arbitrary: a filling, or the rounding noise that a projection has left of a column.
    """
    gram_schmidt = dispatch.bind("gram_schmidt", Z, Z.dtype)
    panel, first, shortest = gram_schmidt(Z, basis if near is None else near)
    noise = shortest <= NOISE * torch.linalg.vector_norm(Z, dim=-2).amax(-1)
    if basis is None and all(pivot > EASY_PIVOT for pivot in first.tolist()):
        return panel, [False] * len(Z)
    for number in range(1, MAX_ROUNDS):
        panel, pivot, shortest = gram_schmidt(panel, basis)
        health = torch.stack([first if number == 1 else pivot, pivot, shortest, noise], dim=-1).tolist()
        # NaN > x is False: a zero column makes NaN
        sound = [a > MIN_PIVOT and b > MIN_PIVOT for a, b, *_ in health]
        if not all(sound):
            return _repair(Z, panel, basis, sound), [not good for good in sound]
        if all(norm > SETTLED for _, _, norm, _ in health):
            break
    return panel, [bool(arbitrary) for *_, arbitrary in health]


def _repair(Z: Tensor, panel: Tensor, basis: Tensor | None, sound: list[bool]) -> Tensor:
    """The panels that CholeskyQR could not make by Householder's way, and one more look at those that it could."""
    bad = [index for index, good in enumerate(sound) if not good]
    panel[bad] = _fill(Z[bad], None if basis is None else basis[bad])
    good = [index for index, good in enumerate(sound) if good]
    if good:  # they may not have settled; a further round harms no panel
        panel[good], _ = orthonormalize(panel[good], None if basis is None else basis[good])
    return panel


def _fill(Z: Tensor, basis: Tensor | None) -> Tensor:
    # Householder QR takes any Z, but its columns for zero pivots are arbitrary (for Z = 0 the same ones each time) and
    # may lie along the basis: those are drawn anew. What is left is projected and renormalised until the projection
    # removes nothing.
    generator = torch.Generator(device="cpu").manual_seed(0)
    for _ in range(MAX_ROUNDS):
        panel, factor = torch.linalg.qr(Z)
        pivots = factor.diagonal(dim1=-2, dim2=-1).abs()
        missing = pivots <= 10 * torch.finfo(Z.dtype).eps * pivots.amax(-1, keepdim=True)
        draws = torch.randn(Z.shape[1:], generator=generator, dtype=Z.dtype, device="cpu").to(Z.device)
        Z = project_out(torch.where(missing.unsqueeze(-2), draws, panel), basis)
        norms = torch.linalg.vector_norm(Z, dim=-2)
        if (~missing.any() & (norms.amin() > SETTLED)).item():
            break
    filled: Tensor = torch.linalg.qr(Z)[0]
    return filled
