"""Estimates of the energy deficit from Ritz values and residuals, and the stopping rule of block Krylov.

Everything here is arithmetic with a few hundred numbers, in Python's floats: as many calls of torch take longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

# The gap of θ_r is measured to the Ritz value this many places after it: a single close neighbor is no cluster.
GUARD_VECTORS = 8
# Relative gap between θ_r and the guard value below which θ_r belongs to a cluster.
CLUSTER_GAP = 2e-3
# Multiple of their residuals within which Ritz values may belong to one cluster: the Ritz values of a random part of a
# cluster are that far apart at most, with margin.
SEPARATION = 10.0
# Largest difference of the Ritz values of a cluster, relative to the first. At loose tolerances, residuals are larger
# than the distances of ordinary singular values.
CLUSTER_WIDTH = 1e-2
# Round-off of residuals and of equal Ritz values, relative to θ_1.
ROUNDOFF = 2e-6
# Multiple of the second-order estimate that counts as the energy deficit. Narrower blocks miss more directions of small
# residuals: with four columns, the true deficit was up to 3.1 times the estimate on 46 weights with the spectra of real
# ones.
SAFETY, SAFETY_NARROW = 2.0, 4.0
NARROW = 8
# Steps between two checks of values that may belong to one cluster.
SEPARATING_STEPS = 2
# Smallest factor by which one step with a block of r columns is expected to reduce the energy deficit.
FASTEST_DECAY = 0.02


class Subspace(NamedTuple):
    """Result of an iterative method.

    Attributes:
        V: (n, b) float32, b ≥ r: a basis, or the leading Ritz vectors of H.
        AV: (m, b) A·V where the iteration has computed it on the way, else None; V is orthonormal then.
        deficit: function of the b Ritz values θᵢ = ‖A·vᵢ‖² and of the residuals ‖H·vᵢ − θᵢ·vᵢ‖ of the first r, all
            measured again after the iteration; returns the estimated energy deficit.
        hidden: function of the same, for the energy that a wider block may find besides; None where none would.
    """

    V: Tensor
    AV: Tensor | None
    deficit: Callable[[Sequence[float], Sequence[float]], float]
    hidden: Callable[[Sequence[float], Sequence[float]], float] | None = None


def estimated_deficit(ritz_values: Sequence[float], residuals: Sequence[float], edge: float) -> float:
    """Energy deficit of Ritz pairs, estimated to second order in their residuals.

    A Ritz value with residual t is less than its eigenvalue by about t²/gap, where gap is the distance to the part of
    the spectrum that contains the residual, and by no more than about t where t exceeds the gap (Parlett 1998, §11.7).
    The deficit is the sum of these errors over Σθᵢ.

    Args:
        ritz_values: θᵢ.
        residuals: ‖H·vᵢ − θᵢ·vᵢ‖.
        edge: upper edge of the part of the spectrum that contains the residuals.
    """
    errors = 0.0
    for value, residual in zip(ritz_values, residuals, strict=True):
        gap = max(value - edge, 0.0) + residual
        errors += residual * residual / gap if gap else 0.0
    return _share(errors, ritz_values)


class Cluster(NamedTuple):
    """Consecutive Ritz values that agree within :data:`SEPARATION` times their residuals.

    Attributes:
        first: index of the first one.
        top: upper bound on the eigenvalues of the same cluster.
    """

    first: int
    top: float


def clusters(
    wanted: Sequence[float], following: Sequence[float], residuals: Sequence[float], width: int
) -> Iterator[Cluster]:
    """The clusters of ``width`` values that start with a wanted one.

    Args:
        wanted: r Ritz values, descending.
        following: Ritz values after these, descending.
        residuals: of the wanted ones.
        width: number of values.
    """
    values = [*wanted, *following]
    roundoff = ROUNDOFF * wanted[0]
    for first in range(min(len(wanted), len(values) - width + 1)):
        spread = values[first] - values[first + width - 1] - roundoff
        if spread > CLUSTER_WIDTH * values[first]:
            continue
        # those beyond r have not converged, so their residuals do not count
        measurable = max(max(residuals[first : first + width]) - roundoff, 0.0)
        reach = min(SEPARATION * measurable, CLUSTER_WIDTH * values[first])
        if spread <= reach:
            yield Cluster(first, values[first] + reach)


class UnresolvedSpectrum(NamedTuple):
    """What a Krylov basis tells about the eigenvalues of H that it has not resolved.

    A block of b random columns sees b directions of a cluster of equal eigenvalues. Those of nearly equal ones it
    separates as slowly as their small differences let it, so until then it sees few of them, and their Ritz vectors
    have small residuals: the rest of the cluster is hidden.

    Attributes:
        edge: largest eigenvalue of H projected onto the newest panel, which nearly contains every residual.
        guard_value: Ritz value GUARD_VECTORS places after θ_r.
        following: Ritz values after θ_r, descending, as many as a group that starts with θ_r may have.
        block: b.
    """

    edge: float
    guard_value: float
    following: Sequence[float]
    block: int

    def deficit(self, ritz_values: Sequence[float], residuals: Sequence[float]) -> float:
        """:func:`estimated_deficit` with a safety factor, see :data:`SAFETY`.

        On the diagonal matrices of ``tests/svd/test_iterations.py`` at ranks 4 to 128, this is 0.7 to 3 times the true
        deficit at tolerances of 1e-5 and less, and at least 0.4 times at 1e-3, where second order is rough. At
        tolerances between these, on weights with the spectra of real ones, it can be 0.1 times the true deficit:
        vectors that mix half a dozen directions with nearly equal singular values have small residuals although one of
        these directions is missing.

        In a cluster (hundreds of singular values that agree to three digits) the newest panel may lie outside the
        cluster before the basis spans all of it, so there the gap to ``guard_value`` is used as well. Elsewhere that
        gap overestimates the deficit up to ten times. Where a wide block has found a cluster that it has not resolved,
        no gap is known, and the errors are of first order.
        """
        safety = SAFETY_NARROW if self.block < NARROW else SAFETY
        estimate = safety * estimated_deficit(ritz_values, residuals, self.edge)
        wanted, residuals = _descending(ritz_values, residuals)
        # round-off in the residuals of equal values is no error of theirs
        measurable = [max(residual - ROUNDOFF * wanted[0], 0.0) for residual in residuals]
        if wanted[-1] - self.guard_value < CLUSTER_GAP * wanted[-1]:
            estimate = max(estimate, safety * estimated_deficit(wanted, measurable, self.guard_value))
        if not self._narrow(wanted) and any(clusters(wanted, self.following, residuals, GUARD_VECTORS)):
            estimate = max(estimate, _share(sum(measurable), wanted))
        return estimate

    def hidden(self, ritz_values: Sequence[float], residuals: Sequence[float]) -> float:
        """Energy deficit that the hidden part of a cluster may cause, if its directions displace all that follow.

        It is 0 unless nearly b consecutive values form a cluster. For a block of more than r columns it is 0: it sees
        enough directions of any cluster, and :meth:`deficit` counts their errors.

        Args:
            ritz_values: θᵢ.
            residuals: ‖H·vᵢ − θᵢ·vᵢ‖.
        """
        wanted, residuals = _descending(ritz_values, residuals)
        if not self._narrow(wanted):
            return 0.0
        width = self.block - self.block // 4  # the last of b directions of a cluster converge late
        displaced = (
            sum(cluster.top - value for value in wanted[cluster.first :])
            for cluster in clusters(wanted, self.following, residuals, width)
        )
        return _share(max(displaced, default=0.0), wanted)

    def _narrow(self, wanted: Sequence[float]) -> bool:
        return self.block < len(wanted) + GUARD_VECTORS


def _descending(ritz_values: Sequence[float], residuals: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = sorted(zip(ritz_values, residuals, strict=True), key=lambda pair: -pair[0])
    return [value for value, _ in pairs], [residual for _, residual in pairs]


def _share(errors: float, ritz_values: Sequence[float]) -> float:
    total = sum(value for value in ritz_values if value > 0)
    return errors / total if total > 0 else 0.0


class StoppingRule:
    """Decides when block Krylov solves the projected eigenproblem to check for convergence, and when it stops.

    At rank 128 a check costs as much as a step. Convergence accelerates: the reduction per step so far overestimates
    the number of remaining steps, and :data:`FASTEST_DECAY` underestimates it.

    Attributes:
        last_step: whether one more product, with the next panel, is expected to reach the tolerance.
    """

    def __init__(self, rank: int, tol: float, block: int, check_every: int) -> None:
        self.smallest_basis = rank + GUARD_VECTORS
        self.tol = tol
        self.block = block
        self.check_every = check_every
        self.fastest = FASTEST_DECAY ** min(1.0, block / rank)
        self.next_check = 3
        self.last_check: tuple[int, float] | None = None  # step and estimated deficit
        self.last_step = False

    def check_due(self, step: int, size: int) -> bool:
        """Whether to check after ``step`` steps, with a basis of ``size`` columns."""
        return step >= self.next_check and size >= self.smallest_basis

    def steps_to_check(self, step: int, size: int) -> int:
        """Steps from here to the next check, at least 1, where each adds a block to a basis of ``size`` columns."""
        return max(1, self.next_check - step, -(-(self.smallest_basis - size) // self.block))

    def put_off(self, step: int) -> None:
        """Check again after :data:`SEPARATING_STEPS`, whatever the last check has found."""
        self.last_step, self.next_check = False, step + SEPARATING_STEPS

    def should_stop(self, step: int, deficit: float, rank_deficient: bool) -> bool:
        """Whether the iteration stops now; schedules the next check otherwise.

        In an invariant subspace every residual is zero, even if it is not the wanted subspace: a block of b columns
        spans at most b directions of one eigenvalue. The next panel is then arbitrary. If it contains wanted
        directions, the residuals of the basis extended by it are large, so a second check decides.

        Args:
            step: steps so far.
            deficit: estimated energy deficit.
            rank_deficient: whether a panel was rank-deficient, that is, a basis spanned an invariant subspace.
        """
        if deficit <= self.tol:
            confirmed = (
                self.last_check is not None and self.last_check[0] == step - 1 and self.last_check[1] <= self.tol
            )
            self.last_check, self.next_check = (step, deficit), step + 1
            return confirmed or not rank_deficient
        reduction = 1.0  # per step
        if self.last_check is not None and deficit < self.last_check[1]:
            earlier, before = self.last_check
            reduction = (deficit / before) ** (1 / (step - earlier))
        self.last_check = step, deficit
        self.last_step = not rank_deficient and deficit * max(reduction, self.fastest) <= self.tol / 2
        at_best = math.log(self.tol / deficit) / math.log(self.fastest)
        at_this_rate = math.log(self.tol / deficit) / math.log(reduction) if reduction < 1 else math.inf
        expected = math.sqrt(at_best * min(at_this_rate, 2 * at_best))
        # even at the best rate, no check before floor(at_best) − 1 steps can find that a single step remains
        # convergence accelerates, so that about half as many steps as at this rate are needed
        likely = max(math.floor(0.8 * expected), math.floor(at_this_rate / 2) if reduction < 1 else 0)
        self.next_check = step + max(1, math.floor(at_best) - 1, min(self.check_every, likely))
        return False
