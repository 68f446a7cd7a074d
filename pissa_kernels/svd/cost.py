"""Cost model: the fastest method for a weight, its block width, and its workspace.

Times are estimated from a handful of constants per kind of device and, on a CPU, per instruction set. They only have to
rank methods whose times differ by much. The tests fix the choice where it was measured; ``python -m bench engine``
times the chosen method.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from . import fixed
from .krylov import steps_for_niter
from .machines import MACHINES, PANEL_CALLS, Machine
from .stopping import GUARD_VECTORS

# Small operations of one Rayleigh–Ritz round, and of turning a subspace into triplets.
ROUND_CALLS, FINAL_CALLS = 30, 60
# The upcast block of rows in plain torch, and on a CPU its product.
ROW_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
# Operations per second in products of the fixed schedule, whose panels are in bfloat16 pieces: estimated for an H100.
PIECES_FLOPS = 4e14
# Largest n for which a dense method follows an iteration that has not converged: it takes 0.1 s there.
DENSE_FALLBACK_WIDTH = 1024


@dataclass(frozen=True)
class SolverPlan:
    """Method and parameters for the leading r eigenvectors of AᵀA.

    Attributes:
        method: "krylov", "chebyshev", "gram" or "svd".
        seconds: estimated time.
        block: columns of a block; 0 for the dense methods.
        limit: columns of the largest Krylov basis; 0 for the other methods.
        steps: number of Krylov steps; None to iterate to a tolerance.
        check_every: largest number of Krylov steps between two convergence checks; 1 where a check is cheap.
        through_gram: whether to iterate with the matrix AᵀA instead of with A.
    """

    method: str
    seconds: float
    block: int = 0
    limit: int = 0
    steps: int | None = None
    check_every: int = 1
    through_gram: bool = False


def choose_plan(
    m: int,
    n: int,
    rank: int,
    niter: int | None,
    *,
    machine: str = "cpu",
    exclude: Collection[str] = (),
    formed: bool = True,
) -> SolverPlan:
    """The fastest of :func:`candidates` whose method is not in ``exclude``.

    Args:
        m, n, rank, niter, machine: as for :func:`candidates`.
        exclude: methods.
        formed: whether plans that form AᵀA, or A in float32, are taken although there is another.
    """
    plans = [plan for plan in candidates(m, n, rank, niter, machine=machine) if plan.method not in exclude]
    others = [plan for plan in plans if plan.block and not plan.through_gram]
    return min(plans if formed or not others else others, key=lambda plan: plan.seconds)


@functools.lru_cache(maxsize=256)  # models have few shapes
def candidates(m: int, n: int, rank: int, niter: int | None, *, machine: str = "cpu") -> tuple[SolverPlan, ...]:
    """Every plan that can run on a tall matrix: the dense methods, and the iterations whose blocks fit into n columns.

    Args:
        m: rows of A, m ≥ n.
        n: columns of A.
        rank: r ≤ n.
        niter: rounds of subspace iteration to match; None for a tolerance.
        machine: a key of :data:`MACHINES`; any other device type counts as a GPU.
    """
    constants = MACHINES.get(machine, MACHINES["cuda"])
    call = constants.call
    gram = constants.read * m * n + 2 * m * n * n / constants.gram
    # LAPACK's SVD of a tall matrix starts with a QR factorization
    full_svd = 2.4 * constants.eigenproblem(n) + (4 * m * n * n / constants.flops if m > n else 0.0)
    through_gram = gram + constants.eigenproblem(n) + _final(constants, m, n, rank, rank)
    dense = [SolverPlan("gram", through_gram), SolverPlan("svd", full_svd)]
    if niter is not None:
        return (*dense, *_fixed_plans(constants, m, n, rank, call, niter))
    krylov = _krylov_plans(constants, m, n, rank, call)
    return (*dense, *krylov, *_chebyshev_plans(constants, m, n, rank, call, gram))


def seconds(m: int, n: int, rank: int, niter: int | None, *, machine: str) -> float:
    """Estimated time of the SVD of one weight (m, n), on a GPU in a batch of others.

    Args:
        m, n: sides of the weight.
        rank, niter, machine: as for :func:`candidates`.
    """
    m, n = max(m, n), min(m, n)
    schedule = fixed.schedule(n, rank) if machine in fixed.DEVICES else None
    if schedule is None:
        return choose_plan(m, n, rank, niter, machine=machine).seconds
    read = MACHINES.get(machine, MACHINES["cuda"]).read
    # with the weight and its transpose: once for the sketch, for each degree of a filter, and for the projection
    products = 2 * (2 + sum(schedule.degrees))
    return products * m * n * (read + 2 * schedule.width / PIECES_FLOPS)


def widened(plan: SolverPlan, rank: int) -> SolverPlan:
    """A Krylov plan whose block has more columns than are wanted, so that it sees that many directions of a cluster."""
    block = _multiple_of_16(rank + 2 * GUARD_VECTORS)
    smallest = rank + GUARD_VECTORS + 2 * block
    return replace(plan, block=block, limit=block * math.ceil(max(plan.limit, smallest) / block))


def workspace(m: int, n: int, rank: int, niter: int | None, *, machine: str, batch: int = 1) -> int:
    """Upper estimate of the bytes that the SVDs of a batch of weights take beyond the weights, factors included.

    The tests compare it with measured peaks.

    Args:
        m: rows of a weight.
        n: columns of a weight.
        rank, niter, machine: as for :func:`candidates`.
        batch: number of weights.
    """
    m, n = max(m, n), min(m, n)
    # weights that the schedule does not solve are solved one by one, while the triplets of all are kept and rounded
    alone = _workspace_alone(m, n, rank, niter, machine) + (batch - 1) * 16 * rank * (m + n)
    if machine not in fixed.DEVICES or fixed.schedule(n, rank) is None:
        return alone
    return max(batch * fixed.workspace(m, n, rank), alone)


def _workspace_alone(m: int, n: int, rank: int, niter: int | None, machine: str) -> int:
    chosen = choose_plan(m, n, rank, niter, machine=machine)
    panels = 4 * (m + n) * (2 * rank + 4 * chosen.block)
    if chosen.method == "svd":
        matrices = 16 * m * n
    elif chosen.method == "gram":
        matrices = 32 * n * n  # in float64, where float32 is not accurate enough, with two work matrices of LAPACK
    elif chosen.method == "krylov":
        limit = chosen.limit if chosen.steps is not None else widened(chosen, rank).limit
        matrices = 4 * ((m + n) * limit + 4 * limit**2)
    else:
        matrices = 4 * (4 * n * chosen.block + (2 * n * n if chosen.through_gram else 0))
    return panels + matrices + ROW_BLOCK_BYTES.get(machine.partition(" ")[0], ROW_BLOCK_BYTES["cuda"])


def _krylov_plans(constants: Machine, m: int, n: int, rank: int, call: float) -> list[SolverPlan]:
    """Krylov to a tolerance, for blocks of 4, 8 or a multiple of 16 columns: BLAS takes as long for 24 as for 32."""
    plans = []
    for block in (4, 8, *range(16, _multiple_of_16(rank + GUARD_VECTORS) + 1, 16)):
        # narrower blocks take ordinary singular values of large ranks for clusters, and solve the weight twice
        if block < max(constants.min_block, min(32, rank // 4)):
            continue
        limit = block * math.ceil(max(256, min(6 * rank, 448), 3.5 * rank, 6 * block) / block)
        if limit + block > n:
            continue
        columns = 4 * rank + 9 * block  # as measured (krylov.py)
        basis = min(columns, limit)
        step, check = _krylov_step(constants, m, n, block, basis, call), constants.eigenproblem(basis)
        seconds = math.ceil(columns / block) * step + 2.5 * check + _final(constants, m, n, rank, rank)
        plans.append(SolverPlan("krylov", seconds, block=block, limit=limit, check_every=math.ceil(3 * check / step)))
    return plans


def _fixed_plans(constants: Machine, m: int, n: int, rank: int, call: float, niter: int) -> list[SolverPlan]:
    """Krylov that matches ``niter`` rounds: the first block has a component of each wanted vector already."""
    steps = steps_for_niter(niter)
    block = rank + GUARD_VECTORS
    if (steps + 2) * block > n:
        return []
    limit = (steps + 1) * block
    seconds = (steps + 1) * _krylov_step(constants, m, n, block, limit, call) + constants.eigenproblem(limit)
    return [SolverPlan("krylov", seconds, block=block, limit=limit, steps=steps)]


def _chebyshev_plans(constants: Machine, m: int, n: int, rank: int, call: float, gram: float) -> list[SolverPlan]:
    """Chebyshev filter to a tolerance, with A and through the Gram matrix."""
    block = _multiple_of_16(rank + max(16, rank // 2))
    if 2 * block > n:
        return []
    products, rounds = 14, 3  # typical for weights 400 to 2000 wide
    # orthonormalization, projection and rotations
    small = rounds * (
        constants.eigenproblem(block) + ROUND_CALLS * call + 16 * n * block**2 / constants.flops
    ) + _final(constants, m, n, rank, block)
    direct = products * (2 * constants.product(m, n, block) + 2 * call)
    through = gram + products * (2 * n * n * block / constants.flops + 2 * call)
    return [
        SolverPlan("chebyshev", direct + small, block=block),
        SolverPlan("chebyshev", through + small, block=block, through_gram=True),
    ]


def _final(constants: Machine, m: int, n: int, rank: int, columns: int) -> float:
    """Seconds to turn a subspace of so many columns into the leading triplets."""
    products = constants.product(m, n, columns) + constants.product(m, n, rank)
    panels = 4 * m * columns * (columns + rank) / constants.flops
    return products + panels + 2 * constants.eigenproblem(columns) + FINAL_CALLS * constants.call


def _krylov_step(constants: Machine, m: int, n: int, block: int, basis: int, call: float) -> float:
    """Seconds of a step: two products, projections against half the final basis, two rounds of CholeskyQR."""
    calls = constants.narrow_calls if block <= 8 else PANEL_CALLS
    orthogonal = (2 * basis + 8 * block) * n * block / constants.flops
    return 2 * constants.product(m, n, block) + orthogonal + calls * call


def _multiple_of_16(columns: int) -> int:
    return -(-columns // 16) * 16
