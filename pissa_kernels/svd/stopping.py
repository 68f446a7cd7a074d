"""Estimates of the energy deficit from Ritz values and residuals, and the stopping rule of block Krylov."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
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
# What a divisor is replaced with that is zero because its dividend is.
SMALLEST = torch.finfo(torch.float64).tiny
# Smallest factor by which one step with a block of r columns is expected to reduce the energy deficit.
FASTEST_DECAY = 0.02


class Subspace(NamedTuple):
    """Result of an iterative method.

    Attributes:
        V: (n, r) float32, orthonormal: the leading Ritz vectors of H.
        AV: (m, r) A·V where the iteration has computed it on the way, else None.
        deficit: function of the Ritz values θᵢ = ‖A·vᵢ‖² (r,) and the residuals ‖H·vᵢ − θᵢ·vᵢ‖ (r,), both measured
            again after the iteration; returns the estimated energy deficit, a float64 scalar.
        hidden: function of the same, for the energy that a wider block may find besides; None where none would.
    """

    V: Tensor
    AV: Tensor | None
    deficit: Callable[[Tensor, Tensor], Tensor]
    hidden: Callable[[Tensor, Tensor], Tensor] | None = None


def estimated_deficit(ritz_values: Tensor, residuals: Tensor, edge: Tensor) -> Tensor:
    """Energy deficit of Ritz pairs, estimated to second order in their residuals.

    A Ritz value with residual t is less than its eigenvalue by about t²/gap, where gap is the distance to the part of
    the spectrum that contains the residual, and by no more than about t where t exceeds the gap (Parlett 1998, §11.7).
    The deficit is the sum of these errors over Σθᵢ.

    Args:
        ritz_values: (…, r) θᵢ.
        residuals: (…, r) ‖H·vᵢ − θᵢ·vᵢ‖.
        edge: (…) upper edge of the part of the spectrum that contains the residuals; (…, r) its average for
            each residual.

    Returns:
        (…) float64.
    """
    ritz_values, residuals = ritz_values.double(), residuals.double()
    edge = edge if edge.ndim == ritz_values.ndim else edge.unsqueeze(-1)
    gaps = (ritz_values - edge).clamp_(min=SMALLEST).add_(residuals)
    return _share(residuals.square().div_(gaps).sum(-1), ritz_values)


class Clusters(NamedTuple):
    """The groups of consecutive Ritz values, as many as ``width``, that start with a wanted one.

    Attributes:
        found: (…, k) whether the values of each group agree within :data:`SEPARATION` times their residuals.
        reach: (…, k) how far above the first value of the group eigenvalues of the same cluster may lie.
    """

    found: Tensor
    reach: Tensor

    @classmethod
    def among(cls, wanted: Tensor, following: Tensor, residuals: Tensor, width: int) -> Clusters:
        """The clusters of ``width`` values.

        Args:
            wanted: (…, r) Ritz values, descending.
            following: (…, k) Ritz values after these, descending.
            residuals: (…, r) of the wanted ones.
            width: number of values, at most r + k.
        """
        groups = torch.cat([wanted, following], dim=-1).unfold(-1, width, 1)[..., : wanted.shape[-1], :]
        # those beyond r have not converged, so their residuals do not count
        largest = torch.nn.functional.pad(residuals, (0, width - 1)).unfold(-1, width, 1).amax(-1)
        first, last = groups[..., 0], groups[..., -1]
        roundoff = ROUNDOFF * wanted[..., :1]
        measurable = (largest[..., : groups.shape[-2]] - roundoff).clamp(min=0)
        reach = torch.minimum(SEPARATION * measurable, CLUSTER_WIDTH * first)
        return cls(first - last <= reach + roundoff, reach)


class UnresolvedSpectrum(NamedTuple):
    """What a Krylov basis tells about the eigenvalues of H that it has not resolved.

    A block of b random columns sees b directions of a cluster of equal eigenvalues. Those of nearly equal ones it
    separates as slowly as their small differences let it, so until then it sees few of them, and their Ritz vectors
    have small residuals: the rest of the cluster is hidden.

    Attributes:
        edge: (…) largest eigenvalue of H projected onto the newest panel, which nearly contains every residual.
        guard_value: (…) Ritz value GUARD_VECTORS places after θ_r.
        following: (…, k) Ritz values after θ_r, descending, as many as a group that starts with θ_r may have.
        block: b.
    """

    edge: Tensor
    guard_value: Tensor
    following: Tensor
    block: int

    def deficit(self, ritz_values: Tensor, residuals: Tensor) -> Tensor:
        """:func:`estimated_deficit` with a safety factor of 2.

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
        estimate = 2 * estimated_deficit(ritz_values, residuals, self.edge)
        # round-off in the residuals of equal values is no error of theirs
        measurable = (residuals - ROUNDOFF * ritz_values.amax(-1, keepdim=True)).clamp(min=0)
        cautious = 2 * estimated_deficit(ritz_values, measurable, self.guard_value)
        last = ritz_values.amin(-1)
        clustered = last - self.guard_value < CLUSTER_GAP * last
        estimate = torch.where(clustered, torch.maximum(estimate, cautious), estimate)
        wanted, residuals = _descending(ritz_values, residuals)
        if self._narrow(wanted) or wanted.shape[-1] + self.following.shape[-1] < GUARD_VECTORS:
            return estimate
        first_order = _share(measurable.double().sum(-1), wanted)
        unresolved = Clusters.among(wanted, self.following.double(), residuals, GUARD_VECTORS).found.any(-1)
        return torch.where(unresolved, torch.maximum(estimate, first_order), estimate)

    def hidden(self, ritz_values: Tensor, residuals: Tensor) -> Tensor:
        """Energy deficit that the hidden part of a cluster may cause, if its directions displace all that follow.

        It is 0 unless nearly b consecutive values form a cluster. For a block of more than r columns it is 0: it sees
        enough directions of any cluster, and :meth:`deficit` counts their errors.

        Args:
            ritz_values: (…, r) θᵢ.
            residuals: (…, r) ‖H·vᵢ − θᵢ·vᵢ‖.

        Returns:
            (…) float64.
        """
        wanted, residuals = _descending(ritz_values, residuals)
        width = self.block - self.block // 4  # the last of b directions of a cluster converge late
        if not self._narrow(wanted) or wanted.shape[-1] + self.following.shape[-1] < width:
            return torch.zeros_like(wanted[..., 0])
        found, reach = Clusters.among(wanted, self.following.double(), residuals, width)
        above = (wanted[..., : found.shape[-1]] + reach).unsqueeze(-1)
        displaced = (above - wanted.unsqueeze(-2)).clamp(min=0).triu().sum(-1)
        return _share(torch.where(found, displaced, 0.0).amax(-1), wanted)

    def _narrow(self, wanted: Tensor) -> bool:
        return self.block < wanted.shape[-1] + GUARD_VECTORS


def _descending(ritz_values: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    values, order = ritz_values.double().sort(dim=-1, descending=True)
    return values, residuals.double().gather(-1, order)


def _share(errors: Tensor, ritz_values: Tensor) -> Tensor:
    return errors / ritz_values.clamp(min=0).sum(-1).clamp(min=SMALLEST)


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
        self.check_every = check_every
        self.fastest = FASTEST_DECAY ** min(1.0, block / rank)
        self.next_check = 3
        self.last_check: tuple[int, float] | None = None  # step and estimated deficit
        self.last_step = False

    def check_due(self, step: int, size: int) -> bool:
        """Whether to check after ``step`` steps, with a basis of ``size`` columns."""
        return step >= self.next_check and size >= self.smallest_basis

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
        self.next_check = step + max(1, math.floor(at_best) - 1, min(self.check_every, math.floor(0.8 * expected)))
        return False
