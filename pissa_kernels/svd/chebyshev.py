"""Chebyshev-filtered subspace iteration: no eigenproblem larger than the block.

Each round applies a Chebyshev polynomial of H that is small on the unwanted part of the spectrum [0, a] and grows above
it as fast as a polynomial can, then orthonormalizes and solves the b×b Rayleigh–Ritz problem (Rutishauser 1970; Zhou et
al. 2006). The edge a is the smallest Ritz value of the previous round, which is at most the b-th eigenvalue. This needs
more products than block Krylov and less of everything else, so it is faster where products are cheap: on small weights
through their Gram matrix, and on a GPU.

After a filter that is expected to be the last, the caller measures triplets on the whole block. That is a Rayleigh–Ritz
projection, too; only if the triplets fall short is there another round.

With csrc all of this is one call of csrc/cpu/chebyshev.cpp, which has the constants and the rules of this file again:
threads that each solve a small weight otherwise wait for the interpreter's lock. The tests hold the two against each
other, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops.panels import resolved
from .operators import Operator
from .orthogonalize import orthonormalize
from .stopping import GUARD_VECTORS, Subspace, estimated_deficit

# Largest amplification of the first direction relative to the last wanted one in one round: CholeskyQR needs columns
# that are not nearly all of the first direction. Rounding errors of 2⁻⁹, and the other columns' own parts of that
# direction in the first round, leave room for the first number. Later, with at least two pieces, errors are so small
# that the second will do.
MAX_SPREAD, MAX_SPREAD_LATER = 1e4, 1e6
MAX_DEGREE = 16
# Smallest degree of the first filter, and of the others. No sketch is good enough without one: if the matrix has a few
# more nonzero singular values than the block has columns, its range has some leading directions and none of the others.
MIN_DEGREES = 4, 2
# After the first filter, the eigenvalues that the block leaves out reach to about a·(θ_r/a)^RISE, a its smallest Ritz
# value (weights of MiniLM, and larger ones with their spectra). A filter is expected to be the last if it amplifies θ_r
# relative to these by MIN_MARGIN more than the tolerance asks for, in logarithms. Degrees aim at MARGIN more.
RISE = 0.2
MARGIN, MIN_MARGIN = 1.0, 0.5
# Estimated energy deficit above which a filter that cannot be the last takes one bfloat16 piece of the panel in all
# products: rounding leaves about 1e-6. The first other filter takes two pieces in its last product, and further ones
# three; the products before take one piece less, because the last one damps their rounding errors. Ritz pairs, hence
# the estimate, are in float32.
ROUGH_DEFICIT = 1e-3
# Smallest edge of the unwanted part relative to θ_1: smaller eigenvalues are below round-off in float32.
MIN_EDGE = 1e-6


def chebyshev_subspaces(
    operator: Operator, rank: int, *, block: int, tol: float, max_products: int, seed: int
) -> Iterator[Subspace]:
    """Subspaces that are expected to hold the leading eigenvectors of H to the tolerance, each better than the last.

    Args:
        operator: H, finite, scaled so that its square neither overflows nor underflows in float32.
        rank: r.
        block: b ≥ r + GUARD_VECTORS, columns of the iterated block. Larger blocks converge in fewer rounds.
        tol: tolerance on the estimated energy deficit 1 − ‖AV‖_F²/Σ_{i≤r}σᵢ².
        max_products: number of products with H after which the iteration stops in any case.
        seed: seed of the sketch.

    Raises:
        torch.linalg.LinAlgError: the eigensolver failed.
    """
    Z = operator.sketch(block, seed)
    products, pieces, first_round = 0, 2, True
    while True:
        X, HX, figures = _ritz(operator, Z, rank)
        products += 1
        ritz_values, lengths = figures[:block], figures[block : block + rank]
        # not the smallest Ritz value: directions that the block itself has not resolved lie above it
        deficit = estimated_deficit(ritz_values[-rank:], lengths, ritz_values[block - rank - GUARD_VECTORS])
        if math.isnan(deficit):
            raise torch.linalg.LinAlgError("the eigensolver failed")  # type: ignore[attr-defined]
        smallest, last, first = ritz_values[0], ritz_values[-rank], ritz_values[-1]
        # a block whose last Ritz value is zero spans the whole range
        met = deficit <= tol and (not first_round or smallest <= MIN_EDGE * first)
        if met or products >= max_products:
            yield Subspace(X, None, deficit_of_block)
        if products >= max_products:
            return
        edge = max(smallest, MIN_EDGE * first)
        largest = MAX_SPREAD_LATER if not first_round and (operator.is_float32 or pieces == 3) else MAX_SPREAD
        degree, sufficient, rough = _degree(deficit, edge, last, first, tol, first_round, largest)
        # a zero matrix has no edge
        Z = operator.filter(X, HX, edge if edge > 0 else 1.0, degree, 1 if rough else pieces)
        if sufficient:
            yield Subspace(Z, None, deficit_of_block)
        pieces = pieces if rough else 3
        products += degree - 1
        first_round = False


def _ritz(operator: Operator, Z: Tensor, rank: int) -> tuple[Tensor, Tensor, list[float]]:
    """Ritz pairs on the range of any Z, see :func:`pissa_kernels.ops.reference.ritz`: one transfer to the host."""
    X, HX, figures = operator.ritz(Z, rank)
    if not resolved(figures[-2:]):
        X, HX, figures = operator.ritz(orthonormalize(Z)[0], rank)
    return X, HX, figures.tolist()


def deficit_of_block(values: Sequence[float], residuals: Sequence[float]) -> float:
    """:func:`estimated_deficit` of the leading ones of b Ritz values, of which there are as many as residuals."""
    rank = len(residuals)
    return estimated_deficit(values[:rank], residuals, values[rank + GUARD_VECTORS - 1])


def _degree(
    deficit: float, edge: float, last: float, first: float, tol: float, first_round: bool, largest: float
) -> tuple[int, bool, bool]:
    """Degree of the next filter, whether it is expected to be the last, and whether one bfloat16 piece is enough.

    The degree is limited by the precision of float32. The first filter is never the last, because the deficit of a
    sketch says too little.

    Args:
        deficit: estimated energy deficit.
        edge: upper end of the unwanted part of the spectrum.
        last: θ_r.
        first: θ_1.
        tol: tolerance on the energy deficit.
        first_round: whether this is the first filter.
        largest: largest amplification of θ_1 relative to θ_r.
    """
    least = MIN_DEGREES[not first_round]
    if not (deficit > tol and edge > 0):
        return max(2, least), True, False
    wanted, risen = _growth(last, edge), edge * max(last / edge, 1.0) ** RISE
    unwanted = 0.0 if first_round else _growth(risen, edge)
    needed = math.log(deficit / tol) / 2
    spread = _growth(first, edge) - wanted
    allowed = min(MAX_DEGREE, int(math.log(largest) / spread)) if spread > 0 else MAX_DEGREE

    def amplification(degree: int) -> float:
        return _log_cosh(degree * wanted) - _log_cosh(degree * unwanted)

    degrees = range(least, allowed)
    degree = next((degree for degree in degrees if amplification(degree) >= needed + MARGIN), max(2, allowed))
    sufficient = not first_round and amplification(degree) >= needed + MIN_MARGIN
    return degree, sufficient, deficit > ROUGH_DEFICIT and not sufficient


def _growth(value: float, edge: float) -> float:
    """arcosh(2·value/edge − 1): a Chebyshev polynomial of degree d is cosh(d·arcosh x) at x ≥ 1."""
    return math.acosh(max(2 * value / edge - 1, 1.0))


def _log_cosh(x: float) -> float:
    """log cosh x, in a form that does not overflow."""
    return x + math.log1p(math.exp(-2 * x)) - math.log(2)
