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
# Estimated energy deficit above which a filter that cannot be the last takes one bfloat16 piece of the panel in all
# products: rounding leaves about 1e-6. The first other filter takes two pieces in its last product, and further ones
# three; the products before take one piece less, because the last one damps their rounding errors. Ritz pairs, hence
# the estimate, are in float32.
ROUGH_DEFICIT = 1e-3
# Smallest edge of the unwanted part relative to θ_1: smaller eigenvalues are below round-off in float32.
MIN_EDGE = 1e-6


def chebyshev_subspace(
    operator: Operator, rank: int, *, block: int, tol: float, max_products: int, seed: int
) -> Subspace:
    """The leading eigenvectors of H.

    Args:
        operator: H, finite, scaled so that its square neither overflows nor underflows in float32.
        rank: r.
        block: b ≥ r + GUARD_VECTORS, columns of the iterated block. Larger blocks converge in fewer rounds.
        tol: tolerance on the estimated energy deficit 1 − ‖AV‖_F²/Σ_{i≤r}σᵢ².
        max_products: number of products with H after which the iteration stops in any case.
        seed: seed of the sketch.
    """
    X, _ = orthonormalize(operator.sketch(block, seed))
    products, pieces = 0, 2
    least, later = MIN_DEGREES
    while True:
        X, HX, values, residuals = operator.ritz(X, rank)
        products += 1
        # the only transfer to the host in a round
        figures = torch.cat([values, residuals]).tolist()
        ritz_values, lengths = figures[:block], figures[block:]
        # not the smallest Ritz value: directions that the block itself has not resolved lie above it
        guard_value = ritz_values[block - rank - GUARD_VECTORS]
        deficit = estimated_deficit(ritz_values[-rank:], lengths, guard_value)
        if math.isnan(deficit):
            raise torch.linalg.LinAlgError("the eigensolver failed")  # type: ignore[attr-defined]
        smallest, last, first = ritz_values[0], ritz_values[-rank], ritz_values[-1]
        # a block whose last Ritz value is zero spans the whole range
        met = deficit <= tol and (products > 1 or smallest <= MIN_EDGE * first)
        if met or products >= max_products:
            return Subspace(X[:, -rank:], None, functools.partial(estimated_deficit, edge=guard_value))
        edge = max(smallest, MIN_EDGE * first)
        degree, sufficient = _degree(deficit, edge, last, first, tol, least)
        rough = deficit > ROUGH_DEFICIT and not sufficient
        # a zero matrix has no edge
        Z = operator.filter(X, HX, edge if edge > 0 else 1.0, degree, 1 if rough else pieces)
        X, _ = orthonormalize(Z)
        pieces = pieces if rough else 3
        products += degree - 1
        least = later


def _degree(deficit: float, edge: float, last: float, first: float, tol: float, least: int) -> tuple[int, bool]:
    """Degree of the next filter, limited by the precision of float32, and whether it is expected to be the last.

    Args:
        deficit: estimated energy deficit.
        edge: upper end of the unwanted part of the spectrum.
        last: θ_r.
        first: θ_1.
        tol: tolerance on the energy deficit.
        least: the smallest degree, where the precision allows it.
    """
    if not (deficit > tol and edge > 0):
        return max(2, least), True
    # T_d(x) = cosh(d·arcosh x) for x ≥ 1
    growth = math.acosh(max(2 * last / edge - 1, 1 + 1e-6))
    spread = math.acosh(max(2 * first / edge - 1, 1.0)) - growth
    needed = max(least, math.ceil((math.log(deficit / tol) / 2 + 1.5) / growth))
    allowed = min(MAX_DEGREE, int(math.log(MAX_SPREAD) / spread)) if spread > 0 else MAX_DEGREE
    degree = max(2, min(needed, allowed))
    return degree, degree >= needed
