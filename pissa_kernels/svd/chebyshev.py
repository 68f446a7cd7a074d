"""Chebyshev-filtered subspace iteration: no eigenproblem larger than the block.

Each round applies a Chebyshev polynomial of H that is small on the unwanted part of the spectrum [0, a] and grows above
it as fast as a polynomial can, then orthonormalizes and solves the b×b Rayleigh–Ritz problem (Rutishauser 1970; Zhou et
al. 2006). The edge a is the smallest Ritz value of the previous round, which is at most the b-th eigenvalue. This needs
more products than block Krylov and less of everything else, so it is faster where products are cheap: on small weights
through their Gram matrix, and on a GPU.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .operators import Operator
from .orthogonalize import orthonormalize
from .stopping import GUARD_VECTORS, Subspace, estimated_deficit

# Largest amplification of the first direction relative to the last wanted one in one round: float32 then keeps three
# digits of the last one.
MAX_SPREAD = 1e4
MAX_DEGREE = 16
# Smallest degree of the first filter, and of the others. No sketch is good enough without one: if the matrix has a few
# more nonzero singular values than the block has columns, its range has some leading directions and none of the others.
MIN_DEGREES = 4, 2
# Smallest edge of the unwanted part relative to θ_1: smaller eigenvalues are below round-off in float32.
MIN_EDGE = 1e-6


def chebyshev_subspace(
    operator: Operator, rank: int, *, block: int, tol: float, max_products: int, seed: int
) -> Subspace:
    """The leading eigenvectors of each H of a batch.

    Args:
        operator: H, finite, scaled so that its square neither overflows nor underflows in float32.
        rank: r.
        block: b ≥ r + GUARD_VECTORS, columns of the iterated block. Larger blocks converge in fewer rounds.
        tol: tolerance on the estimated energy deficit 1 − ‖AV‖_F²/Σ_{i≤r}σᵢ² of every H of the batch.
        max_products: number of products with H after which the iteration stops in any case.
        seed: seed of the sketch.
    """
    X, _ = orthonormalize(operator.sketch(block, seed))
    products = 0
    least, later = MIN_DEGREES
    while True:
        matrix, HX, _ = operator.project(X)
        products += 1
        values, vectors = torch.linalg.eigh(matrix)
        X, HX = X @ vectors, HX @ vectors
        wanted = values[:, -rank:]
        residuals = torch.linalg.vector_norm(HX[:, :, -rank:] - X[:, :, -rank:] * wanted.unsqueeze(-2), dim=1)
        # not the smallest Ritz value: directions that the block itself has not resolved lie above it
        guard_value = values[:, block - rank - GUARD_VECTORS]
        deficit = estimated_deficit(wanted, residuals, guard_value)
        # the only transfer to the host in a round
        figures = torch.stack([deficit.float(), values[:, 0], values[:, -rank], values[:, -1]], dim=-1).tolist()
        filtered = products > 1
        # a block whose last Ritz value is zero spans the whole range
        met = all(estimate <= tol and (filtered or last <= MIN_EDGE * first) for estimate, last, _, first in figures)
        if met or products >= max_products:
            return Subspace(X[:, :, -rank:], None, functools.partial(estimated_deficit, edge=guard_value))
        edge = torch.maximum(values[:, 0], MIN_EDGE * values[:, -1])
        edge = torch.where(edge > 0, edge, 1.0)[:, None, None]  # a zero matrix of the batch stays zero
        X, _ = orthonormalize(_filtered(operator, X, HX, edge, degree := _degree(figures, tol, least)))
        products += degree - 1
        least = later


def _degree(figures: list[list[float]], tol: float, least: int) -> int:
    """Degree that the slowest matrix of the batch needs, limited by the precision of float32.

    Args:
        figures: for each matrix of the batch, its estimated deficit and the Ritz values θ_b, θ_r and θ_1.
        tol: tolerance on the energy deficit.
        least: the smallest degree, where the precision allows it.
    """
    needed, allowed = least, MAX_DEGREE
    for deficit, edge, last, first in figures:
        edge = max(edge, MIN_EDGE * first)
        if not (deficit > tol and edge > 0):
            continue
        # T_d(x) = cosh(d·arcosh x) for x ≥ 1
        growth = math.acosh(max(2 * last / edge - 1, 1 + 1e-6))
        spread = math.acosh(max(2 * first / edge - 1, 1.0)) - growth
        needed = max(needed, math.ceil((math.log(deficit / tol) / 2 + 1.5) / growth))
        if spread > 0:
            allowed = min(allowed, int(math.log(MAX_SPREAD) / spread))
    return max(2, min(needed, allowed))


def _filtered(operator: Operator, X: Tensor, HX: Tensor, edge: Tensor, degree: int) -> Tensor:
    """T_degree(2H/a − 1)·X by the three-term recurrence, where a is ``edge`` (batch, 1, 1)."""
    previous, current = X, HX * (2 / edge) - X
    for _ in range(degree - 1):
        following = operator.multiply(current).mul_(4 / edge).sub_(current, alpha=2).sub_(previous)
        previous, current = current, following
    return current
