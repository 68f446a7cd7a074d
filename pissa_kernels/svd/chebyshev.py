"""Chebyshev-filtered subspace iteration: no eigenproblem larger than the block.

Each round applies a Chebyshev polynomial of H that is small on the unwanted part of the spectrum [0, a] and grows as
fast as a polynomial can above it, then orthonormalises and solves the b×b Rayleigh–Ritz problem (Rutishauser 1970; Zhou
et al. 2006). a is the smallest Ritz value of the round before, which never exceeds the b-th eigenvalue. It needs more
products than block Krylov and far less of everything else, which is the better bargain where products are cheap: on
small weights through their Gram matrix, and on a GPU.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .krylov import GUARD_VECTORS, Subspace, missing_energy
from .operators import Operator
from .orthogonalize import orthonormalize

# How much more a round may amplify the first direction than the last wanted one: float32 keeps three digits of the
# last one then.
MAX_SPREAD = 1e4
MAX_DEGREE = 16
# The least edge of the unwanted part, relative to θ_1: below it float32 knows no eigenvalues.
FLATTEST = 1e-6


def chebyshev_subspace(
    operator: Operator, rank: int, *, block: int, tol: float, max_products: int, seed: int
) -> Subspace:
    """The leading eigenvectors of each H of a stack.

    Args:
        operator: H, finite, scaled so that its square neither overflows nor vanishes in float32.
        rank: r.
        block: b ≥ r + GUARD_VECTORS, the columns that are iterated; the more, the faster.
        tol: stop when the estimated energy deficit 1 − ‖AV‖_F²/Σ_{i≤r}σᵢ² of every H is below it.
        max_products: give up after so many products with H.
        seed: of the sketch.
    """
    X, _ = orthonormalize(operator.sketch(block, seed))
    products = 0
    while True:
        projection, Z, _ = operator.project(X)
        products += 1
        values, vectors = torch.linalg.eigh(projection)
        X, Z = X @ vectors, Z @ vectors
        wanted = values[:, -rank:]
        residuals = torch.linalg.vector_norm(Z[:, :, -rank:] - X[:, :, -rank:] * wanted.unsqueeze(-2), dim=1)
        # the gap to the edge of the block would leave out what the block itself has not resolved
        beyond = values[:, block - rank - GUARD_VECTORS]
        missing = missing_energy(wanted, residuals, beyond)
        # the one transfer of a round
        figures = torch.stack([missing.float(), values[:, 0], values[:, -rank], values[:, -1]], dim=-1).tolist()
        if all(lacking <= tol for lacking, *_ in figures) or products >= max_products:
            return Subspace(X[:, :, -rank:], None, functools.partial(missing_energy, edge=beyond))
        edge = torch.maximum(values[:, 0], FLATTEST * values[:, -1])
        edge = torch.where(edge > 0, edge, 1.0)[:, None, None]  # a zero matrix in the stack stays zero
        X, _ = orthonormalize(_filtered(operator, X, Z, edge, degree := _degree(figures, tol)))
        products += degree - 1


def _degree(figures: list[list[float]], tol: float) -> int:
    """The degree that the slowest of the stack needs, as far as float32 lets it.

    Args:
        figures: for each of the stack its missing energy and the Ritz values θ_b, θ_r and θ_1.
        tol: what the missing energy is to become.
    """
    needed, allowed = 2, MAX_DEGREE
    for missing, edge, last, first in figures:
        edge = max(edge, FLATTEST * first)
        if not (missing > tol and edge > 0):
            continue
        # T_d(x) = cosh(d·arcosh x) beyond 1
        growth = math.acosh(max(2 * last / edge - 1, 1 + 1e-6))
        spread = math.acosh(max(2 * first / edge - 1, 1.0)) - growth
        needed = max(needed, math.ceil((math.log(missing / tol) / 2 + 1.5) / growth))
        if spread > 0:
            allowed = min(allowed, int(math.log(MAX_SPREAD) / spread))
    return max(2, min(needed, allowed))


def _filtered(operator: Operator, X: Tensor, Z: Tensor, edge: Tensor, degree: int) -> Tensor:
    """T_degree(2H/a − 1)·X by the three-term recurrence, from X and Z = H·X; a is ``edge`` (batch, 1, 1)."""
    previous, current = X, Z * (2 / edge) - X
    for _ in range(degree - 1):
        following = operator.multiply(current).mul_(4 / edge).sub_(current, alpha=2).sub_(previous)
        previous, current = current, following
    return current
