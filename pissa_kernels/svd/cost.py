"""The cost model: which method, and with what block, for a stack of weights. The only place that decides.

Times are estimates from a handful of constants per kind of device. They need to rank the methods where these differ
by much; the tests pin the choice where it was measured, ``python -m bench engine`` times what was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .krylov import GUARD_VECTORS, steps_for_niter


@dataclass(frozen=True)
class Machine:
    """Constants of a kind of device.

    Attributes:
        flops: float32 operations a second in a matrix product.
        touch: seconds to read one element of a weight, widening it.
        narrow: columns that a product takes longer by, as if its panel had them more.
        block: the least columns of a Krylov block that pay.
        call: seconds for one small operation, its launch or its way through Python.
        eigh: coefficients (n, n², n³) of the seconds for float32 ``eigh``.
    """

    flops: float
    touch: float
    call: float
    eigh: tuple[float, float, float]
    narrow: int = 4
    block: int = 16

    def eigenproblem(self, n: int) -> float:
        linear, square, cube = self.eigh
        return linear * n + square * n**2 + cube * n**3

    def product(self, m: int, n: int, columns: int) -> float:
        return self.touch * m * n + 2 * m * n * (columns + self.narrow) / self.flops + self.call


MACHINES = {
    # two AVX2 cores, measured; BLAS, and csrc's products
    "cpu": Machine(flops=1.5e11, touch=1.5e-10, call=6e-6, eigh=(0.0, 3.3e-8, 5e-11)),
    "cpu csrc": Machine(flops=1.5e11, touch=2e-11, call=6e-6, eigh=(0.0, 3.3e-8, 5e-11), narrow=2, block=8),
    # an H100, estimated: float32 without TF32 at 40 TFLOP/s, 2 bytes an element at 2 TB/s, cuSOLVER's syevd
    "cuda": Machine(flops=4e13, touch=1e-12, call=1e-5, eigh=(2e-5, 0.0, 2e-11)),
}
# What the plain torch bodies on the CPU widen a block of rows into, and what a product makes of it.
ROW_BLOCK_BYTES = 8 << 20
# Small operations of one CholeskyQR2 with its projections, and of one Rayleigh–Ritz round.
PANEL_CALLS = 50
ROUND_CALLS = 20
# What turning a subspace into triplets takes beyond measuring them.
DENSE_CALLS = 60
# A spectrum too flat for an iteration is handed to the dense method up to this width, where that takes 0.1 s.
CHEAP_GRAM = 1024


@dataclass(frozen=True)
class SolverPlan:
    """How to find the leading r eigenvectors of AᵀA.

    Attributes:
        method: "krylov", "chebyshev", "gram" or "svd".
        seconds: the estimate that it was chosen by.
        block: columns of a block, 0 for the dense methods.
        limit: columns of the largest Krylov basis, else 0.
        steps: Krylov steps where their number is fixed, None to iterate to a tolerance.
        check_every: Krylov steps that may pass between two looks at the projected problem, 1 where these cost little.
        through_gram: iterate with the matrix AᵀA instead of with A.
    """

    method: str
    seconds: float
    block: int = 0
    limit: int = 0
    steps: int | None = None
    check_every: int = 1
    through_gram: bool = False


def machine_of(weight: Tensor) -> str:
    """The key of :data:`MACHINES` for products with this weight."""
    device = weight.device.type
    return "cpu csrc" if device == "cpu" and ops.backend("normal", weight) == "csrc" else device


def plan(
    m: int,
    n: int,
    rank: int,
    niter: int | None,
    *,
    device: str = "cpu",
    batch: int = 1,
    without: Collection[str] = (),
) -> SolverPlan:
    """The cheapest of :func:`candidates` whose method is not in ``without``."""
    plans = candidates(m, n, rank, niter, device=device, batch=batch)
    return min((plan for plan in plans if plan.method not in without), key=lambda plan: plan.seconds)


def candidates(
    m: int, n: int, rank: int, niter: int | None, *, device: str = "cpu", batch: int = 1
) -> list[SolverPlan]:
    """Every plan that fits, the iterations only where their blocks leave most of A's smaller side free.

    Args:
        m, n, rank: a tall matrix (m, n), m ≥ n, and r ≤ n.
        niter: None for a tolerance, else the rounds of subspace iteration to be matched.
        device: a key of :data:`MACHINES`; any other device type counts as a GPU.
        batch: weights that share the small operations; the estimate is for each of them.
    """
    machine = MACHINES.get(device, MACHINES["cuda"])
    call = machine.call / batch
    gram = 2 * machine.touch * m * n + 2 * m * n * n / machine.flops
    # LAPACK's SVD of a tall matrix starts with its QR factorisation; a Gram matrix leaves a small SVD in float64
    factorised = 2.4 * machine.eigenproblem(n) + (4 * m * n * n / machine.flops if m > n else 0.0)
    through_gram = gram + machine.eigenproblem(n) + 6 * machine.eigenproblem(rank) + DENSE_CALLS * call
    dense = [SolverPlan("gram", through_gram), SolverPlan("svd", factorised)]
    if niter is not None:
        return dense + _fixed_plans(machine, m, n, rank, call, niter)
    return dense + _krylov_plans(machine, m, n, rank, call) + _chebyshev_plans(machine, m, n, rank, call, gram)


def workspace(m: int, n: int, rank: int, niter: int | None, *, device: str, batch: int = 1) -> int:
    """Bytes that :func:`plan`'s choice takes beyond one weight (m, n), either way round, its factors included.

    An upper estimate: the tests hold it against what is measured.
    """
    m, n = max(m, n), min(m, n)
    chosen = plan(m, n, rank, niter, device=device, batch=batch)
    panels = 4 * (m + n) * (2 * rank + 4 * chosen.block)
    if chosen.method == "svd":
        matrices = 16 * m * n
    elif chosen.method == "gram":
        matrices = 32 * n * n  # in float64, where float32 will not do, with LAPACK's two
    elif chosen.method == "krylov":
        matrices = 4 * ((m + n) * chosen.limit + 4 * chosen.limit**2)
    else:
        matrices = 4 * (4 * n * chosen.block + (2 * n * n if chosen.through_gram else 0))
    return panels + matrices + (ROW_BLOCK_BYTES if device in MACHINES and device != "cuda" else 0)


def _krylov_plans(machine: Machine, m: int, n: int, rank: int, call: float) -> list[SolverPlan]:
    """Krylov to a tolerance, one plan for each block: whole multiples of 16, because BLAS takes 24 for 32; or 8."""
    plans = []
    for block in (8, *range(16, _multiple_of_16(rank + GUARD_VECTORS) + 1, 16)):
        if block < machine.block:
            continue
        limit = block * math.ceil(max(256, min(6 * rank, 512), 4 * rank, 6 * block) / block)
        if limit + block > n:
            continue
        columns = 5 * rank + 9 * block  # krylov.py's, and two blocks for an estimate on the safe side
        basis = min(columns, limit)
        step, look = _krylov_step(machine, m, n, block, basis, call), machine.eigenproblem(basis)
        seconds = math.ceil(columns / block) * step + 4 * look
        plans.append(SolverPlan("krylov", seconds, block=block, limit=limit, check_every=math.ceil(3 * look / step)))
    return plans


def _fixed_plans(machine: Machine, m: int, n: int, rank: int, call: float, niter: int) -> list[SolverPlan]:
    """Krylov that matches ``niter`` rounds: a block that holds a component of each wanted vector from the start."""
    steps = steps_for_niter(niter)
    block = rank + GUARD_VECTORS
    if (steps + 2) * block > n:
        return []
    limit = (steps + 1) * block
    seconds = (steps + 1) * _krylov_step(machine, m, n, block, limit, call) + machine.eigenproblem(limit)
    return [SolverPlan("krylov", seconds, block=block, limit=limit, steps=steps)]


def _chebyshev_plans(machine: Machine, m: int, n: int, rank: int, call: float, gram: float) -> list[SolverPlan]:
    block = _multiple_of_16(rank + max(16, rank // 2))
    if 2 * block > n:
        return []
    products, rounds = 14, 3.5  # typical of MiniLM's weights
    small = rounds * (
        machine.eigenproblem(block) + (PANEL_CALLS + ROUND_CALLS) * call + 40 * n * block**2 / machine.flops
    )
    direct = products * (2 * machine.product(m, n, block) + 4 * call)
    through = gram + products * (2 * n * n * block / machine.flops + 5 * call)
    return [
        SolverPlan("chebyshev", direct + small, block=block),
        SolverPlan("chebyshev", through + small, block=block, through_gram=True),
    ]


def _krylov_step(machine: Machine, m: int, n: int, block: int, basis: int, call: float) -> float:
    """Two products, one of two projections against half the final basis, two CholeskyQR rounds."""
    orthogonal = (2 * basis + 8 * block) * n * block / machine.flops
    return 2 * machine.product(m, n, block) + orthogonal + PANEL_CALLS * call


def _multiple_of_16(columns: int) -> int:
    return -(-columns // 16) * 16
