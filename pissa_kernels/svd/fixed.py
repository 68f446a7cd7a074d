"""Truncated SVD by a fixed schedule, for GPUs: nothing is decided on the host until the certificate.

On a GPU, products with a weight take microseconds, and what costs is everything in between: small dense problems,
transfers that a decision waits for, launches. So all weights of a batch go through the same steps:

1. a sketch with random signs, and one product with H = AᵀA;
2. Chebyshev filters of fixed degrees, with an orthonormalization by shifted CholeskyQR [1]_ after each. The panel has
   at least twice the wanted columns. A filter's edge is read off the diagonal of R in H·X = Q·R;
3. one Rayleigh–Ritz projection, and a certificate from its residuals.

Panels are rounded to one bfloat16 piece for all products but the last of the last filter: the filters that follow damp
the rounding errors of earlier products. A weight whose certificate falls short goes through further filters, with two
pieces. The certificates are the only transfer to the host in a round.

Every step is an operation of :mod:`pissa_kernels.ops.batched`, whose results do not depend on the other members of a
batch. So neither do the triplets: a weight has the same ones on every process, whatever the free memory.

References:
    .. [1] T. Fukaya, R. Kannan, Y. Nakatsukasa, Y. Yamamoto, Y. Yanagisawa: Shifted Cholesky QR for computing the QR
       factorization of ill-conditioned matrices. SIAM Journal on Scientific Computing 42, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.batched import Panel, Weights
from .solution import Solution
from .steps import FINE, ROUGH, Steps


class Schedule(NamedTuple):
    """Columns of the panel, and the degree of each filter."""

    width: int
    degrees: tuple[int, ...]


# For ranks up to the key: the cheapest whose energy deficits are near 1e-6 in emulated bfloat16 arithmetic, on spectra
# of real weights interpolated to n = 4096, with and without outliers. Up to 128 columns cost a GPU no time, because
# products with so few are limited by the reading of the weight.
SCHEDULES = {
    16: Schedule(128, (3, 4)),
    32: Schedule(128, (2, 3, 3)),
    64: Schedule(192, (2, 3, 3)),
    128: Schedule(256, (2, 3, 3)),
    256: Schedule(448, (2, 3, 3)),
}
# Filters of a weight whose certificate falls short: their degree, and how many there are at most.
FURTHER_DEGREE = 3
FURTHER_ROUNDS = 4
# What the schedule has been compiled for in this process: a weight's device, dtype, layout and alignment, and the rank.
_compiled: set[tuple[object, ...]] = set()
# Types of devices whose weights go through the schedule.
DEVICES: tuple[str, ...] = ("cuda",)


def runs_on(device: torch.device, shape: Sequence[int], rank: int) -> bool:
    """Whether weights of a shape (m, n) go through the schedule on a device."""
    return device.type in DEVICES and schedule(min(shape), rank) is not None


def schedule(n: int, rank: int) -> Schedule | None:
    """The schedule for weights whose smaller side is n; None where there is none.

    A panel of n or more columns is the identity, without filters: the projection is the eigenproblem of AᵀA.
    """
    for largest, found in SCHEDULES.items():
        if rank <= largest:
            return found if found.width < n else Schedule(n, ())
    return None


def workspace(m: int, n: int, rank: int) -> int:
    """Upper estimate of the bytes that the schedule takes for each weight (m, n), m ≥ n, beyond the weight."""
    found = schedule(n, rank)
    assert found is not None
    b = found.width
    panels = n * b * (5 * 4 + 9 * 2) + m * b * (4 + 3 * 2)
    measured = rank * (5 * 4 + 4 * 6) * (n + m)
    signs = 8 * m * b  # once for a batch
    return panels + measured + 8 * 4 * b * b + signs


def solve(weights: Sequence[Tensor], rank: int, *, tol: float, seed: int) -> Solution:
    """The leading triplets of each tall weight of a batch.

    Args:
        weights: (m, n) each, m ≥ n, of one dtype and one layout, on one device.
        rank: r, for which :func:`schedule` has a schedule.
        tol: energy deficit above which a weight goes through further filters.
        seed: seed of the sketch.

    Returns:
        Triplets of every weight. Those whose ``deficit`` is not at most ``tol`` have not converged.
    """
    plan = schedule(weights[0].shape[1], rank)
    assert plan is not None
    _compile(weights[0], rank, plan, ahead=weights[0].is_cuda)
    return follow(Steps(Weights.of(weights), rank), plan, tol, seed)


def follow(steps: Steps, plan: Schedule, tol: float, seed: int) -> Solution:
    """Take the steps of a schedule, and further ones for the weights that need them. As for :func:`solve`."""
    X = _filtered(steps, plan, seed)
    solution = steps.projected(X)
    if not plan.degrees:
        return solution
    left = list(range(steps.weights.shape[0]))
    for _ in range(FURTHER_ROUNDS):
        # NaN, where a panel has lost its rank, is not above the tolerance
        kept = [place for place, member in enumerate(left) if solution.figures[member].deficit > tol]
        if not kept:
            break
        left = [left[place] for place in kept]
        steps, X = steps.part(kept), X.part(kept)
        X = steps.filtered(X, [FINE] * FURTHER_DEGREE, last=True)
        solution.update(left, steps.projected(X))
    return solution


def _filtered(steps: Steps, plan: Schedule, seed: int) -> Panel:
    """The panels after the filters of a schedule; the identity where it has none."""
    if not plan.degrees:
        return steps.identity()
    X = steps.sketch(plan.width, seed)
    for degree in plan.degrees[:-1]:
        X = steps.filtered(X, [ROUGH] * degree)
    return steps.filtered(X, [ROUGH] * (plan.degrees[-1] - 1) + [FINE], last=True)


def _compile(weight: Tensor, rank: int, plan: Schedule, ahead: bool) -> None:
    """Compile the kernels of the schedule for weights like this one ``ahead`` of the first launch, once."""
    key = weight.device, weight.dtype, weight.shape, weight.stride(), weight.data_ptr() % 16, rank
    if not ahead or key in _compiled:
        return
    steps = Steps(Weights.of([weight]), rank)

    def every_step() -> None:
        X = _filtered(steps, plan, seed=0)
        steps.projected(X)
        if plan.degrees:
            steps.filtered(X, [FINE] * FURTHER_DEGREE, last=True)

    steps.body.compile_ahead(every_step, weight.device)
    _compiled.add(key)
