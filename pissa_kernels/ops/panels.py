"""Tall panels in plain torch: orthonormalization, Ritz pairs, triplets, and the recurrence of a Chebyshev filter.

A tall panel Z (n, b), b ≪ n, is orthonormalized through its b×b Gram matrix (CholeskyQR2, Fukaya et al. 2014): matrix
products and a small Cholesky factorization, several times faster than Householder QR on every device. In float32 this
needs cond(Z) < 1/√ε ≈ 3·10³ after the columns are scaled to unit length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The constants are also in csrc/cpu/orthonormalize.cpp.
#
# Smallest pivot of the scaled Gram matrix's Cholesky factor for which CholeskyQR is used. Below it the first round may
# lose orthogonality completely (ε·cond² ≈ 1), and the second cannot restore it.
MIN_PIVOT = 1e-3
# Smallest pivot for which one round is as accurate as two: the columns are nearly orthogonal.
ONE_ROUND_PIVOT = 0.5
# Length of the shortest unit column after a projection above which the basis and the panel are orthogonal already.
ORTHOGONAL_LENGTH = 0.99
MAX_ROUNDS = 6
# Columns up to which a panel is transposed before it is projected: BLAS takes two to six times as long for eight
# columns as for eight rows.
NARROW = 16


class CholeskyQR(NamedTuple):
    """The result of one round of CholeskyQR on Z (n, b).

    Attributes:
        panel: (n, b), Z·change.
        change: (b, b), upper triangular.
        pivot: (), the smallest pivot of the Cholesky factor; 0 or NaN where the factorization failed.
        shortest: (), the norm of the shortest column of Z.
    """

    panel: Tensor
    change: Tensor
    pivot: Tensor
    shortest: Tensor


def cholesky_qr(Z: Tensor) -> CholeskyQR:
    """Orthonormalize the columns of Z to ε·cond(Z)².

    Multiplies by the inverse of the Cholesky factor: a triangular solve with a 4096×64 panel takes three times as long.
    """
    gram = Z.mT @ Z
    norms = gram.diagonal().sqrt()
    scale = norms.reciprocal()
    factor, info = torch.linalg.cholesky_ex(gram * scale.unsqueeze(-1) * scale)
    pivot = factor.diagonal().amin().masked_fill(info != 0, 0.0)
    change = torch.linalg.solve_triangular(factor, torch.diag(scale), upper=False).mT
    return CholeskyQR(Z @ change, change, pivot, norms.amin())


def project_out(Z: Tensor, basis: Tensor) -> Tensor:
    """Z (n, b) minus its projection onto the orthonormal rows of a basis (k, n)."""
    if not len(basis):
        return Z
    if Z.shape[1] <= NARROW:
        return torch.addmm(Z.mT, Z.mT @ basis.mT, basis, alpha=-1).mT
    return torch.addmm(Z, basis.mT, basis @ Z, alpha=-1)


def orthonormalize(Z: Tensor, basis: Tensor | None = None, near: int = 0) -> tuple[Tensor, Tensor]:
    """Block Gram–Schmidt with CholeskyQR. See :func:`pissa_kernels.ops.orthonormalize`."""
    basis = Z.new_empty(0, len(Z)) if basis is None else basis
    panel, _, first, shortest = cholesky_qr(project_out(Z, basis[near:]))
    kept = shortest / torch.linalg.vector_norm(Z, dim=0).amax() if len(basis) else torch.ones_like(shortest)
    figures = torch.stack([first, first, kept])
    if not len(basis) and float(first) > ONE_ROUND_PIVOT:
        return panel, figures
    for _ in range(1, MAX_ROUNDS):
        panel, _, pivot, shortest = cholesky_qr(project_out(panel, basis))
        figures = torch.stack([first, pivot, kept])
        # one transfer to the host; a zero column makes the pivot NaN, and NaN > x is False
        before, after, length = torch.stack([first, pivot, shortest]).tolist()
        if not (before > MIN_PIVOT and after > MIN_PIVOT) or length > ORTHOGONAL_LENGTH:
            break
    return panel, figures


def recurrence(
    multiply: Callable[[Tensor, int], Tensor], X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int
) -> Tensor:
    """T_degree(2H/edge − 1)·X by the three-term recurrence.

    Args:
        multiply: H·panel for a panel and a number of bfloat16 pieces.
        X: (n, b).
        HX: (n, b) H·X.
        edge: upper end of the part of the spectrum where the polynomial is small.
        degree: at least 1.
        pieces: of the panel in the last product. The others take one piece less, because the products after them damp
            their rounding errors.
    """
    previous, current = X, HX * (2 / edge) - X
    for left in reversed(range(degree - 1)):
        product = multiply(current, max(1, pieces - 1) if left else pieces)
        previous, current = current, product.mul_(4 / edge).sub_(current, alpha=2).sub_(previous)
    return current


def ritz_pairs(
    Z: Tensor, rank: int, project: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz pairs on the range of Z, with H·Q and QᵀHQ by ``project``. See :func:`pissa_kernels.ops.reference.ritz`."""
    Q, pivots = orthonormalize(Z)
    if not resolved(pivots):
        return Q, Q, torch.cat([Z.new_full((Z.shape[1] + rank,), torch.nan), pivots[:2]])
    HQ, matrix = project(Q)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, vectors = torch.full_like(matrix[0], torch.nan), matrix
    X, HX = Q @ vectors, HQ @ vectors
    residuals = column_residuals(HX[:, -rank:], X[:, -rank:], values[-rank:])
    return X, HX, torch.cat([values, residuals, pivots[:2]])


def column_residuals(P: Tensor, Q: Tensor, scale: Tensor) -> Tensor:
    """‖pⱼ − sⱼ·qⱼ‖ (k,) of each pair of columns of P and Q (n, k), with factors s (k,)."""
    norms: Tensor = torch.linalg.vector_norm(P - Q * scale, dim=0)
    return norms


def triplets_of(
    V: Tensor,
    rank: int,
    image: Tensor | None,
    multiply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets, with A·V and Aᵀ·U by functions. See :func:`pissa_kernels.ops.reference.triplets`."""
    if image is None:
        V, pivots = orthonormalize(V)
        Y = multiply(V)
    else:
        V, change, pivot, _ = cholesky_qr(V)
        pivots = pivot.expand(2)
        Y = image @ change
    Q, others = orthonormalize(Y)
    pivots = torch.minimum(pivots[:2], others[:2])  # NaN if one is
    if not resolved(pivots):
        return Q[:, :rank], V[:, :rank], torch.cat([V.new_full((V.shape[1] + rank,), torch.nan), pivots])
    U, S, V, residuals = triplets_from(Q, Y, V, rank, adjoint)
    return U, V, torch.cat([S, residuals, pivots])


def triplets_from(
    Q: Tensor, Y: Tensor, V: Tensor, rank: int, adjoint: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U (m, rank), S (b,), V (n, rank) and the residuals (rank,) for A·V = Y = Q·R, Q and V orthonormal.

    S and the residuals are NaN where LAPACK's SVD fails.
    """
    try:
        X, S, Zh = (factor.to(V.dtype) for factor in torch.linalg.svd((Q.mT @ Y).double()))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        S = torch.full_like(V[0], torch.nan)
        return Q[:, :rank], S, V[:, :rank], S[:rank]
    Z = Zh[:rank].mT
    U, V = Q @ X[:, :rank], V @ Z
    residuals = torch.maximum(column_residuals(Y @ Z, U, S[:rank]), column_residuals(adjoint(U), V, S[:rank]))
    return U, S, V, residuals


def resolved(pivots: Tensor) -> bool:
    """Whether CholeskyQR, whose smallest pivots (…,) these are, has left no column to Householder QR."""
    return bool((pivots[:2] > MIN_PIVOT).all())  # not if one is NaN
