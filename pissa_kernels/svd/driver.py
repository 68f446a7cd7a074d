"""Truncated SVD with a certificate.

All methods consist of products with the weights, orthonormalization and small dense problems, so they run on the
weights' device. They take tall matrices; a wide weight is transposed (a view).

On a GPU, weights of equal shape go through the fixed schedule of :mod:`pissa_kernels.svd.fixed` together. On a CPU, and
where the schedule does not reach the tolerance, each weight is solved alone, by the method that
:mod:`pissa_kernels.svd.cost` chooses. These methods end in :mod:`pissa_kernels.svd.rayleigh_ritz`, which turns the
subspace into triplets and measures their residuals.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import exact_arithmetic
from . import fixed
from .chebyshev import chebyshev_subspaces, deficit_of_block
from .cost import DENSE_FALLBACK_WIDTH, SolverPlan, choose_plan, widened
from .krylov import block_krylov
from .machines import machine_of
from .operators import GramOperator, ScaledOperator
from .rayleigh_ritz import Triplets, as_triplets, certified, dense_triplets, gram_triplets, rayleigh_ritz
from .result import TruncatedSVD
from .solution import Solution
from .stopping import Subspace
from .weight_operator import WeightOperator

ITERATIONS = ("krylov", "chebyshev")
# Tolerance on the energy deficit.
DEFAULT_TOL = 1e-6
# Products with AᵀA after which an iteration stops.
MAX_STEPS = 100
# Residual relative to σ₁ above which the Gram matrix is formed in float64. On a well-conditioned weight float32 stays
# below it; singular values below √ε·σ₁ need float64.
GRAM_RESIDUAL = 1e-5
# σ_r/σ₁ below which σ_r² is near the round-off of σ₁² in float32.
STEEP = 1e-2


def solve_batch(
    weights: Sequence[Tensor], rank: int, *, tol: float, niter: int | None, seed: int
) -> list[TruncatedSVD]:
    """:func:`pissa_kernels.truncated_svd` of each weight of a batch. Checks no argument.

    The triplets of a weight do not depend on the other weights.

    Args:
        weights: (m, n) each, of one dtype and one layout, on one device; at least one.
        rank, tol, niter, seed: as for :func:`pissa_kernels.truncated_svd`.

    Raises:
        ValueError: NaN or Inf in a weight.
    """
    found: list[TruncatedSVD | None] = [None] * len(weights)
    if fixed.runs_on(weights[0].device, weights[0].shape, rank):
        found = _by_schedule(weights, rank, tol, seed)
    return [
        _alone(weight, rank, tol, niter, seed) if svd is None else svd
        for weight, svd in zip(weights, found, strict=True)
    ]


def _by_schedule(weights: Sequence[Tensor], rank: int, tol: float, seed: int) -> list[TruncatedSVD | None]:
    """The triplets of the weights that the fixed schedule solves to the tolerance, None for the others.

    They are more accurate than those of any number of rounds that "pissa_niter_N" is used with.
    """
    first = weights[0]
    wide = first.shape[0] < first.shape[1]
    with exact_arithmetic(first.device):
        tall = [weight.detach().mT if wide else weight.detach() for weight in weights]
        return of_solution(fixed.solve(tall, rank, tol=tol, seed=seed), wide, tol)


def of_solution(solution: Solution, wide: bool, tol: float) -> list[TruncatedSVD | None]:
    """The triplets of the weights that the fixed schedule has solved to the tolerance, None for the others.

    Args:
        solution: of tall matrices.
        wide: whether these are the transposed weights.
        tol: tolerance on the energy deficit.
    """
    U, V = (solution.V, solution.U) if wide else (solution.U, solution.V)
    Vh = V.mT.contiguous()
    found: list[TruncatedSVD | None] = []
    for index, figures in enumerate(solution.figures):
        certificate = figures.certificate(tol)
        found.append(
            TruncatedSVD(U[index], solution.S[index], Vh[index], certificate) if certificate.converged else None
        )
    return found


def _alone(weight: Tensor, rank: int, tol: float, niter: int | None, seed: int) -> TruncatedSVD:
    """The triplets of one weight, by itself."""
    with exact_arithmetic(weight.device):
        return by_plan(WeightOperator(weight.detach()), machine_of(weight), rank, tol, niter, seed)


def by_plan(
    operator: ScaledOperator,
    machine: str,
    rank: int,
    tol: float,
    niter: int | None,
    seed: int,
    *,
    formed: bool = True,
) -> TruncatedSVD:
    """The triplets by the method that the cost model expects to be the fastest, or by the next one.

    Args:
        operator: products with the weight.
        machine: a key of :data:`pissa_kernels.svd.machines.MACHINES`.
        rank, tol, niter, seed: as for :func:`pissa_kernels.truncated_svd`.
        formed: whether methods that form AᵀA, or A in float32, may be chosen where there is another.
    """
    m, n = operator.shape
    tried: list[str] = []
    while True:
        plan = choose_plan(m, n, rank, niter, machine=machine, exclude=tried, formed=formed)
        if plan.method not in ITERATIONS:
            break
        tried.append(plan.method)
        try:
            triplets, converged = _iterate(operator, rank, plan, tol, seed)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        # after block Krylov, a dense method follows only where it is fast; after a fixed number of steps, none
        final = plan.steps is not None or (plan.method == "krylov" and n > DENSE_FALLBACK_WIDTH)
        if converged or final:
            return certified(operator, triplets, converged, plan.method)
    by_gram = _by_gram(operator, rank) if plan.method == "gram" else None
    if by_gram is None:
        return certified(operator, dense_triplets(operator, rank), True, "svd")
    return certified(operator, by_gram, True, "gram")


def _by_gram(operator: ScaledOperator, rank: int) -> Triplets | None:
    """Triplets from the Gram matrix, in float64 where float32 is not accurate enough; None where LAPACK fails."""
    triplets = None
    for dtype in (torch.float32, torch.float64):
        try:
            triplets = gram_triplets(operator, rank, dtype)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue  # eigh does not converge on some matrices with many equal eigenvalues
        if not bool(triplets.residuals.amax() > GRAM_RESIDUAL * triplets.S[0]):
            break
    return triplets


def _iterate(operator: ScaledOperator, rank: int, plan: SolverPlan, tol: float, seed: int) -> tuple[Triplets, bool]:
    """Triplets by the iteration of ``plan``, and whether they meet the tolerance."""
    H = GramOperator(operator.gram(torch.float32), operator.shape[0]) if plan.through_gram else operator
    if plan.method == "chebyshev":
        return _chebyshev(operator, H, rank, plan.block, tol, seed)
    krylov = functools.partial(block_krylov, H, rank, tol=tol, max_steps=MAX_STEPS, seed=seed)
    subspace = krylov(block=plan.block, limit=plan.limit, steps=plan.steps, check_every=plan.check_every)
    triplets, converged = _evaluated(operator, subspace, rank, tol)
    if plan.steps is not None:
        if bool(triplets.S[-1] < STEEP * triplets.S[0]):
            # float32 squares mix directions with singular values this small, which subspace iteration would separate
            triplets = rayleigh_ritz(operator, operator.adjoint(triplets.U), rank)
        return triplets, converged
    columns = rank
    if not converged and _hides_energy(subspace, triplets, tol):
        plan = widened(plan, rank)
        columns = plan.block
        if plan.limit + plan.block > operator.shape[-1]:
            return triplets, converged
        subspace = krylov(block=plan.block, limit=plan.limit, check_every=plan.check_every)
        triplets, converged = _evaluated(operator, subspace, rank, tol)
    if not converged and operator.passes < 2 * MAX_STEPS:
        # the last step reduced the deficit by less than the stopping rule predicted
        start = torch.cat([triplets.V, H.sketch(columns - rank, seed)], dim=-1) if columns > rank else triplets.V
        subspace = krylov(block=columns, limit=plan.limit, start=start)
        triplets, converged = _evaluated(operator, subspace, rank, tol)
    return triplets, converged


def _chebyshev(
    operator: ScaledOperator, H: ScaledOperator | GramOperator, rank: int, block: int, tol: float, seed: int
) -> tuple[Triplets, bool]:
    gram = H.gram if isinstance(H, GramOperator) else None
    found = operator.chebyshev(gram, rank, block, tol, MAX_STEPS, seed)
    if found is not None:
        triplets = as_triplets(*found)
        return triplets, deficit_of_block(*_eigenpairs(triplets)) <= tol
    for subspace in chebyshev_subspaces(H, rank, block=block, tol=tol, max_products=MAX_STEPS, seed=seed):
        triplets, converged = _evaluated(operator, subspace, rank, tol)
        if converged:
            break
    return triplets, converged


def _evaluated(operator: ScaledOperator, subspace: Subspace, rank: int, tol: float) -> tuple[Triplets, bool]:
    """The leading triplets on a subspace, and whether their estimated energy deficit is at most ``tol``."""
    triplets = rayleigh_ritz(operator, subspace.V, rank, subspace.AV)
    measured = _eigenpairs(triplets)
    met = subspace.deficit(*measured) <= tol
    return triplets, met and (subspace.hidden is None or subspace.hidden(*measured) <= tol)


def _hides_energy(subspace: Subspace, triplets: Triplets, tol: float) -> bool:
    """Whether only a wider block can tell that the triplets meet the tolerance."""
    assert subspace.hidden is not None
    return subspace.hidden(*_eigenpairs(triplets)) > tol


def _eigenpairs(triplets: Triplets) -> tuple[list[float], list[float]]:
    """Eigenvalues of AᵀA, and the residuals of the first eigenpairs, which are σ times those of the triplets."""
    S, residuals = [*triplets.S.tolist(), *triplets.following.tolist()], triplets.residuals.tolist()
    return [s * s for s in S], [s * residual for s, residual in zip(S, residuals, strict=False)]
