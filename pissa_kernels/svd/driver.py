"""Truncated SVD with a certificate.

All methods consist of products with the weights, orthonormalization and small dense problems, so they run on the
weights' device. They take tall matrices; a wide weight is transposed (a view).

On a GPU, weights of equal shape go through the fixed schedule of :mod:`pissa_kernels.svd.fixed` together. On a CPU, and
where the schedule does not reach the tolerance, each weight is solved alone, by the method that
:mod:`pissa_kernels.svd.cost` chooses. These methods end in :mod:`pissa_kernels.svd.rayleigh_ritz`, which turns the
subspace into triplets and measures their residuals.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import check_accuracy, check_rank, check_weight
from ..numerics import exact_arithmetic
from ..runtime.shards import Shard, ShardedStack, is_sharded, on_mesh, sharded_stack
from . import fixed, sharded_steps
from .chebyshev import chebyshev_subspaces, deficit_of_block
from .cost import DENSE_FALLBACK_WIDTH, SolverPlan, choose_plan, machine_of, widened
from .krylov import block_krylov
from .operators import GramOperator, ScaledOperator
from .rayleigh_ritz import Triplets, as_triplets, certified, dense_triplets, gram_triplets, rayleigh_ritz
from .result import TruncatedSVD
from .sharded import serving
from .solution import Solution
from .stopping import Subspace
from .weight_operator import WeightOperator

ITERATIONS = ("krylov", "chebyshev")
# Tolerance on the energy deficit.
DEFAULT_TOL = 1e-6
# Products with AᵀA after which an iteration stops.
MAX_STEPS = 100
# Sharded matrices that go through the schedule together at most: more of them save no time.
LARGEST_BATCH = 32
# Residual relative to σ₁ above which the Gram matrix is formed in float64. On a well-conditioned weight float32 stays
# below it; singular values below √ε·σ₁ need float64.
GRAM_RESIDUAL = 1e-5
# σ_r/σ₁ below which σ_r² is near the round-off of σ₁² in float32.
STEEP = 1e-2


def truncated_svd(
    weight: Tensor, rank: int, *, tol: float = DEFAULT_TOL, niter: int | None = None, seed: int = 0
) -> TruncatedSVD:
    """The leading singular triplets of a weight, to a tolerance on the energy deficit.

    The method is block Krylov [1]_ [2]_ or Chebyshev-filtered subspace iteration [3]_ where these are faster than a
    dense factorization. The weight is read in its own dtype and layout; only a full SVD copies it to float32.

    The energy deficit is 1 − ‖W·V‖_F²/Σ_{i≤r}σᵢ². It is estimated from the residuals of the triplets [4]_.

    Args:
        weight: (m, n), float32, float16 or bfloat16, any strides, finite. For a ``DTensor`` every process of its mesh
            calls this, and gets the same bits; no process holds the whole weight, unless the rank is near n or an
            iteration fails.
        rank: r, 1 ≤ r ≤ min(m, n).
        tol: tolerance on the energy deficit. If the estimate does not come below it, ``certificate.converged`` is
            False.
        niter: None to iterate to ``tol``. Otherwise ``tol`` is not used, and the result is at least as accurate as
            ``torch.svd_lowrank(W, rank, niter=niter)``, which is ``niter`` rounds of subspace iteration with a block of
            ``rank`` columns.
        seed: seed of the sketch. Equal seeds give equal bits on one machine; torch's global random state is neither
            used nor changed.

    Returns:
        U (m, r), S (r,), Vh (r, n) and the certificate; of a ``DTensor`` whole, as plain tensors.

    Raises:
        TypeError: a dtype other than float32, float16 and bfloat16, or a quantized tensor.
        ValueError: not 2-D, empty, a rank out of range, NaN or Inf, ``tol`` or ``niter`` out of range, or singular
            values beyond float32's range.

    Examples:
        A matrix with known singular values, and its three leading triplets:

        >>> import torch
        >>> import pissa_kernels as pk
        >>> def matrix(singular_values, m=300, n=200):
        ...     generator = torch.Generator().manual_seed(0)
        ...     U, _ = torch.linalg.qr(torch.randn(m, len(singular_values), generator=generator))
        ...     V, _ = torch.linalg.qr(torch.randn(n, len(singular_values), generator=generator))
        ...     return (U * singular_values) @ V.T
        >>> s = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
        >>> U, S, Vh, certificate = pk.truncated_svd(matrix(s), rank=3)
        >>> bool(torch.allclose(S, s[:3], rtol=1e-5))
        True
        >>> bool(torch.allclose(U * S, matrix(s) @ Vh.T, atol=1e-4))
        True
        >>> certificate.converged
        True
        >>> round(certificate.energy, 4)  # (25 + 16 + 9)/(25 + 16 + 9 + 4 + 1)
        0.9091

        A cluster of singular values across index r. The second vector may be any direction in the cluster, so single
        vectors are not a measure of accuracy; the captured energy is nearly the same for all of them:

        >>> s = torch.tensor([5.0, 2.001, 2.0, 2.0, 1.999, 1.0])
        >>> W = matrix(s)
        >>> U, S, Vh, certificate = pk.truncated_svd(W, rank=2)
        >>> deficit = 1 - (W @ Vh.T).square().sum() / s[:2].square().sum()
        >>> bool(deficit < 1e-5)
        True
        >>> bool(torch.allclose(S, s[:2], rtol=1e-3))
        True

    References:
        .. [1] C. Musco, C. Musco: Randomized block Krylov methods for stronger and faster approximate singular value
           decomposition. NeurIPS 2015, arXiv 1504.05477.
        .. [2] J. A. Tropp, R. J. Webber: Randomized algorithms for low-rank matrix approximation. 2023, arXiv
           2306.12418.
        .. [3] Y. Zhou, Y. Saad, M. L. Tiago, J. R. Chelikowsky: Self-consistent-field calculations using
           Chebyshev-filtered subspace iteration. Journal of Computational Physics 219, 2006.
        .. [4] B. N. Parlett: The Symmetric Eigenvalue Problem. SIAM 1998, §11.7.
    """
    check_weight(weight)
    check_rank(rank, weight.shape)
    check_accuracy(tol, niter)
    if is_sharded(weight):
        local = on_mesh(weight)
        return solve_stack(sharded_stack(weight, local), rank, tol=tol, niter=niter, seed=seed)[0]
    return solve_batch([weight], rank, tol=tol, niter=niter, seed=seed)[0]


def solve_batch(
    weights: Sequence[Tensor], rank: int, *, tol: float, niter: int | None, seed: int
) -> list[TruncatedSVD]:
    """:func:`truncated_svd` of each weight of a batch. Checks no argument.

    The triplets of a weight do not depend on the other weights.

    Args:
        weights: (m, n) each, of one dtype and one layout, on one device; at least one.
        rank, tol, niter, seed: as for :func:`truncated_svd`.

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
        return _of_solution(fixed.solve(tall, rank, tol=tol, seed=seed), wide, tol)


def _of_solution(solution: Solution, wide: bool, tol: float) -> list[TruncatedSVD | None]:
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
        return _by_plan(WeightOperator(weight.detach()), machine_of(weight), rank, tol, niter, seed)


def solve_sharded(shard: Shard, rank: int, *, tol: float, niter: int | None, seed: int) -> TruncatedSVD | None:
    """:func:`truncated_svd` of a weight that several processes hold. Checks no argument.

    All of them call this. The first decides and does what is done with panels; the others multiply their blocks for it
    (:mod:`pissa_kernels.svd.sharded`). So nothing depends on whether their arithmetic is the same, bit by bit.

    Args:
        shard: what this process holds of the weight.
        rank, tol, niter, seed: as for :func:`truncated_svd`.

    Returns:
        The triplets in the first process, None in the others.

    Raises:
        ValueError, RuntimeError: of any of the processes, in all of them.
    """
    with exact_arithmetic(shard.block.device), serving(shard) as operator:
        if operator is None:
            return None
        # a matrix of n² elements is no larger than a panel where n is small
        formed = operator.shape[1] <= DENSE_FALLBACK_WIDTH
        return _by_plan(operator, machine_of(shard.block), rank, tol, niter, seed, formed=formed)


def solve_stack(
    stack: ShardedStack,
    rank: int,
    *,
    tol: float,
    niter: int | None,
    seed: int,
    context: Callable[[int], contextlib.AbstractContextManager[object]] = lambda part: contextlib.nullcontext(),
) -> list[TruncatedSVD]:
    """The triplets of the matrices of a sharded stack that this process has a part of, in all processes that have one.

    Args:
        stack: what this process holds.
        rank, tol, niter, seed: as for :func:`truncated_svd`.
        context: what an error of a matrix passes through, by its index in the stack.

    Raises:
        ValueError, RuntimeError: of any of the processes, in all of them.
    """
    found: list[TruncatedSVD | None] = []
    failure: Exception | None = None
    try:
        if stack.replicas.is_first:  # replicas hold the same, and one of them solves it
            by_schedule = _sharded_by_schedule(stack.matrices, rank, tol, seed)
            for part, matrix, svd in zip(stack.parts, stack.matrices, by_schedule, strict=True):
                with context(part):
                    if svd is None:
                        svd = solve_sharded(matrix, rank, tol=tol, niter=niter, seed=seed)
                    found.append(svd)
    except Exception as error:
        failure = error
    stack.everywhere.agree(failure)
    found = found or [None] * len(stack.matrices)
    return [_shared(svd, matrix, rank, stack) for svd, matrix in zip(found, stack.matrices, strict=True)]


def _sharded_by_schedule(matrices: Sequence[Shard], rank: int, tol: float, seed: int) -> list[TruncatedSVD | None]:
    """:func:`_by_schedule` of sharded weights; None for the same ones in all processes."""
    if not matrices or not fixed.runs_on(matrices[0].block.device, matrices[0].shape, rank):
        return [None] * len(matrices)
    wide = matrices[0].shape[0] < matrices[0].shape[1]
    with exact_arithmetic(matrices[0].block.device):
        tall = [matrix.mT if wide else matrix for matrix in matrices]
        return [
            svd
            for first in range(0, len(tall), LARGEST_BATCH)
            for svd in _of_solution(
                sharded_steps.solve(tall[first : first + LARGEST_BATCH], rank, tol=tol, seed=seed), wide, tol
            )
        ]


def _shared(svd: TruncatedSVD | None, matrix: Shard, rank: int, stack: ShardedStack) -> TruncatedSVD:
    """The triplets of the first process."""
    (m, n), device = matrix.shape, matrix.block.device
    factors = [torch.empty(shape, dtype=torch.float32, device=device) for shape in ((m, rank), (rank,), (rank, n))]
    if svd is not None:
        factors = [factor.contiguous() for factor in svd[:3]]
    certificate = svd.certificate if svd is not None else None
    for processes in (matrix.over_both, stack.replicas):
        certificate = processes.share(certificate)
        for factor in factors:
            processes.broadcast_(factor)
    assert certificate is not None
    U, S, Vh = factors
    return TruncatedSVD(U, S, Vh, certificate)


def _by_plan(
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
        machine: a key of :data:`pissa_kernels.svd.cost.MACHINES`.
        rank, tol, niter, seed: as for :func:`truncated_svd`.
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
