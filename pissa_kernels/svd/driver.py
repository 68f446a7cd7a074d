"""Truncated SVD with a certificate: the engine's public face.

Every step works on a stack of weights of equal shape, of which a single weight is the smallest, and is written in
products with the weights, orthonormalisation and small dense problems, so that it runs wherever the weights are.
The methods work on tall operators; a wide weight is seen through its transpose (a view). :mod:`pissa_kernels.svd.cost`
chooses among them. Whatever found the subspace, :func:`rayleigh_ritz` turns it into triplets and :func:`_measured`
measures them against the weight itself.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..checks import check_accuracy, check_rank, check_weight
from ..numerics import exact_arithmetic
from .chebyshev import chebyshev_subspace
from .cost import CHEAP_GRAM, SolverPlan, machine_of, plan
from .krylov import Subspace, block_krylov
from .operators import GramOperator, WeightOperator
from .rayleigh_ritz import Triplets, dense_triplets, gram_triplets, rayleigh_ritz, truncated_svds
from .result import TruncatedSVD

ITERATIONS = ("krylov", "chebyshev")
# The energy deficit that is iterated to where nothing else is asked for.
DEFAULT_TOL = 1e-6
# Products with AᵀA before an iteration gives up.
MAX_STEPS = 100
# What a float32 Gram matrix leaves on a well-conditioned weight is below this; where it leaves more, singular values
# below √ε·σ₁ are wanted, and only a float64 one knows them.
GRAM_RESIDUAL = 1e-5
# σ_r/σ₁ below which σ_r² is near the rounding of σ₁² in float32.
STEEP = 1e-2


def truncated_svd(
    weight: Tensor, rank: int, *, tol: float = DEFAULT_TOL, niter: int | None = None, seed: int = 0
) -> TruncatedSVD:
    """The leading ``rank`` singular triplets of a weight, to a tolerance on the captured energy.

    Block Krylov (:mod:`pissa_kernels.svd.krylov`) or filtered subspace iteration (:mod:`pissa_kernels.svd.chebyshev`)
    where they are the cheaper way, a dense factorization elsewhere. The weight is read as it is stored; torch's global
    random state is neither used nor changed.

    Args:
        weight: (m, n), float32, float16 or bfloat16, any strides, finite.
        rank: 1 ≤ rank ≤ min(m, n).
        tol: on the energy deficit 1 − ‖W·V‖_F²/Σ_{i≤r}σᵢ². Iterates until the estimate of what is left is below it, or
            reports ``converged=False``.
        niter: instead of ``tol``, promise at least the accuracy of that many rounds of subspace iteration with a block
            of ``rank`` columns, as ``torch.svd_lowrank(W, rank, niter=niter)`` does them.
        seed: of the sketch; equal seeds give equal bits on one machine.

    Returns:
        U, S, Vh and the certificate.

    Raises:
        TypeError: a dtype that is not float32, float16 or bfloat16, or a quantised tensor.
        ValueError: not 2-D, empty, a rank out of range, NaN or Inf, ``tol`` or ``niter`` out of range.
    """
    check_weight(weight)
    check_rank(rank, weight.shape)
    check_accuracy(tol, niter)
    return solve_batch(weight.unsqueeze(0), rank, tol=tol, niter=niter, seed=seed)[0]


def solve_batch(weights: Tensor, rank: int, *, tol: float, niter: int | None, seed: int) -> list[TruncatedSVD]:
    """:func:`truncated_svd` of each weight of a batch, with the small problems solved together. Checks no argument.

    Every weight starts from the same sketch. Its triplets depend on the other weights only by round-off and by the
    number of steps, which continue until the slowest weight has converged.

    Args:
        weights: (batch, m, n), batch ≥ 1.
        rank, tol, niter, seed: as for :func:`truncated_svd`.

    Raises:
        ValueError: NaN or Inf in a weight.
    """
    with exact_arithmetic(weights.device):
        operator = WeightOperator(weights.detach())
        batch, m, n = operator.shape
        tried: list[str] = []
        while True:
            chosen = plan(m, n, rank, niter, device=machine_of(weights), batch=batch, without=tried)
            if chosen.method not in ITERATIONS:
                break
            tried.append(chosen.method)
            try:
                triplets, converged = _iterate(operator, rank, chosen, tol, seed)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                continue
            # Krylov has the last word among iterations; a dense method has it where that is cheap
            final = chosen.steps is not None or (chosen.method == "krylov" and n > CHEAP_GRAM)
            if all(converged) or final:
                return truncated_svds(operator, triplets, converged, chosen.method)
        if chosen.method == "svd":
            return truncated_svds(operator, dense_triplets(operator, rank), [True] * batch, "svd")
        triplets = gram_triplets(operator, rank, torch.float32)
        if (triplets.residuals.amax(-1) > GRAM_RESIDUAL * triplets.S[:, 0]).any().item():
            triplets = gram_triplets(operator, rank, torch.float64)
        return truncated_svds(operator, triplets, [True] * batch, "gram")


def _iterate(
    operator: WeightOperator, rank: int, chosen: SolverPlan, tol: float, seed: int
) -> tuple[Triplets, list[bool]]:
    """The triplets that an iteration comes to, and for each weight whether they meet the tolerance."""
    H = GramOperator(operator.gram(torch.float32), operator.shape[1]) if chosen.through_gram else operator
    if chosen.method == "chebyshev":
        found = chebyshev_subspace(H, rank, block=chosen.block, tol=tol, max_products=MAX_STEPS, seed=seed)
        return _evaluated(operator, found, tol)
    krylov = functools.partial(block_krylov, H, rank, limit=chosen.limit, tol=tol, max_steps=MAX_STEPS, seed=seed)
    found = krylov(block=chosen.block, steps=chosen.steps, check_every=chosen.check_every)
    triplets, converged = _evaluated(operator, found, tol)
    if chosen.steps is not None:
        if (triplets.S[:, -1] < STEEP * triplets.S[:, 0]).any().item():
            # float32 squares mix directions this far below the first, which the promised rounds would tell apart
            triplets = rayleigh_ritz(operator, operator.adjoint(triplets.U))
    elif not all(converged) and operator.passes < 2 * MAX_STEPS:
        # the last step did not bring what was expected of it
        found = krylov(block=rank, start=triplets.V)
        triplets, converged = _evaluated(operator, found, tol)
    return triplets, converged


def _evaluated(operator: WeightOperator, found: Subspace, tol: float) -> tuple[Triplets, list[bool]]:
    triplets = rayleigh_ritz(operator, found.V, found.AV)
    # the residual of an eigenpair of AᵀA is σ times that of the triplet
    missing = found.missing(triplets.S.square(), triplets.residuals * triplets.S)
    return triplets, (missing <= tol).tolist()
