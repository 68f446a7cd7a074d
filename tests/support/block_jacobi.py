"""The block Jacobi method of :mod:`pissa_kernels.ops.triton.jacobi` in plain torch, for matrices of real sizes.

Triton's interpreter takes minutes for them. A test compares the two on small matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24


def block_jacobi(matrix: Tensor, rows: int, sweeps: int) -> tuple[Tensor, Tensor, int]:
    """Eigenvalues (b,), descending, eigenvectors (b, b), and the number of sweeps, the last without a rotation.

    Args:
        matrix: (b, b) float32, symmetric, with a largest element near 1.
        rows: of a subproblem, a power of two.
        sweeps: the most that are made.
    """
    size = len(matrix)
    pairs = max(1, -(-size // rows))
    A = torch.zeros(pairs * rows, pairs * rows)
    A[:size, :size] = matrix
    V = torch.eye(pairs * rows)
    norm, tolerance = A.abs().max(), math.sqrt(size) * UNIT_ROUNDOFF
    made, rotations = 0, True
    while rotations and made < sweeps:
        made, rotations = made + 1, False
        for step in range(2 * pairs - 1):
            order = torch.cat([_members(step, pair, pairs, rows) for pair in range(pairs)])
            tiles = A[order][:, order].view(pairs, rows, pairs, rows)
            diagonal_tiles = torch.stack([tiles[pair, :, pair] for pair in range(pairs)])
            found, Q = _sweep(diagonal_tiles, norm, tolerance)
            rotations |= not torch.equal(Q, torch.eye(rows).expand_as(Q))
            tiles = torch.einsum("iab,iajc,jcd->ibjd", Q, tiles, Q)
            for pair in range(pairs):
                tiles[pair, :, pair] = found[pair]
            A[order[:, None], order] = tiles.reshape_as(A)
            V[:, order] = torch.einsum("xia,iab->xib", V[:, order].view(-1, pairs, rows), Q).reshape_as(V)
    values, order = A.diagonal()[:size].sort(descending=True, stable=True)
    return values, V[:size, :size][:, order], made


def _members(step: int, pair: int, pairs: int, rows: int) -> Tensor:
    rounds = 2 * pairs - 1
    blocks = sorted(((step + pair) % rounds, (step - pair) % rounds if pair else rounds))
    return torch.cat([torch.arange(rows // 2) + block * (rows // 2) for block in blocks])


def _sweep(A: Tensor, norm: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The tiles (pairs, rows, rows) after a sweep, and its rotations Q."""
    rows = A.shape[-1]
    index = torch.arange(rows)
    diagonal = A.diagonal(dim1=-2, dim2=-1).clone()
    idle = A.abs() <= _threshold(diagonal[:, :, None] * diagonal[:, None, :], norm, tolerance)
    idle |= torch.eye(rows, dtype=torch.bool)
    before, Qt = A, torch.eye(rows).repeat(len(A), 1, 1)
    for distance in range(1, rows):
        partner = index ^ distance
        first = index < partner
        off = 0.5 * (A[:, index, partner] + A[:, partner, index])
        other = diagonal[:, partner]
        needed = off.abs() > _threshold(diagonal * other, norm, tolerance)
        theta = 0.5 * (other - diagonal) / torch.where(needed, off, 1.0)
        sign = torch.where((theta > 0) | ((theta == 0) & first), 1.0, -1.0)
        tangent = torch.where(needed, sign / (theta.abs() + (1 + theta * theta).sqrt()), 0.0)
        cosine = 1 / (1 + tangent * tangent).sqrt()
        mine, theirs = diagonal - tangent * off, other + tangent * off
        swapped = needed & (mine != theirs) & (first == (mine < theirs))
        sine = torch.where(swapped, -sign * cosine, tangent * cosine)
        half = sine / (1 + torch.where(swapped, sign * tangent * cosine, cosine))
        diagonal = torch.where(swapped, theirs, mine)
        A, Qt = _rotated(_rotated(A, partner, sine, half).mT, partner, sine, half), _rotated(Qt, partner, sine, half)
        A = A.contiguous()
        A[:, index, partner] = torch.where(needed, 0.0, A[:, index, partner])
    A = 0.5 * (A + A.mT)
    A[:, index, index] = diagonal
    unchanged = idle.all(-1).all(-1)[:, None, None]
    return torch.where(unchanged, before, A), torch.where(unchanged, torch.eye(rows), Qt.mT)


def _rotated(A: Tensor, partner: Tensor, sine: Tensor, half: Tensor) -> Tensor:
    return A - sine[:, :, None] * (A[:, partner] + half[:, :, None] * A)


def _threshold(product: Tensor, norm: Tensor, tolerance: float) -> Tensor:
    return tolerance * torch.where(product > 0, product.clamp(min=0).sqrt(), norm)
