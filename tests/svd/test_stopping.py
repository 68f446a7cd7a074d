"""The estimate of the energy deficit and the stopping rule of block Krylov."""

from __future__ import annotations

import math

import pytest
import torch

from pissa_kernels.svd.stopping import (
    CLUSTER_GAP,
    FASTEST_DECAY,
    GUARD_VECTORS,
    NARROW,
    ROUNDOFF,
    SAFETY,
    SAFETY_NARROW,
    SEPARATION,
    StoppingRule,
    UnresolvedSpectrum,
    estimated_deficit,
)


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4])
def test_the_estimate_is_the_true_deficit_to_second_order(angle: float) -> None:
    """Two Ritz vectors of H = diag(4, 3, 1), the second one rotated toward the third eigenvector."""
    H = torch.diag(torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64))
    V = torch.tensor([[1.0, 0.0], [0.0, math.cos(angle)], [0.0, math.sin(angle)]], dtype=torch.float64)
    ritz_values = (V * (H @ V)).sum(0)
    residuals = (H @ V - V * ritz_values).norm(dim=0)
    true_deficit = 1 - float(ritz_values.sum()) / 7.0
    estimate = estimated_deficit(ritz_values.tolist(), residuals.tolist(), 1.0)
    assert estimate == pytest.approx(true_deficit, rel=3 * angle)


def test_a_residual_that_exceeds_the_gap_counts_once() -> None:
    estimate = estimated_deficit([2.0, 1.0], [0.0, 0.5], 1.0)
    assert estimate == pytest.approx(0.5 / 3.0)


def test_a_zero_matrix_has_no_deficit() -> None:
    zeros = [0.0, 0.0, 0.0]
    assert estimated_deficit(zeros, zeros, 0.0) == 0.0


def test_residuals_that_are_not_a_number_are_no_convergence() -> None:
    assert math.isnan(estimated_deficit([2.0, 1.0], [0.0, math.nan], 0.5))


def unresolved(guard_value: float, following: list[float], block: int) -> UnresolvedSpectrum:
    return UnresolvedSpectrum(0.5, guard_value, following, block)


@pytest.mark.parametrize(("block", "safety"), [(4, SAFETY_NARROW), (NARROW, SAFETY)])
def test_in_a_cluster_the_gap_to_the_guard_value_counts(block: int, safety: float) -> None:
    ritz_values, residuals = [2.0, 1.0], [0.0, 1e-3]
    far, near = (1 - 2 * CLUSTER_GAP, 0.5, 0.0), (1 - CLUSTER_GAP / 2, CLUSTER_GAP / 2, -2 * ROUNDOFF)
    for guard_value, gap, extra in (far, near):
        estimate = unresolved(guard_value, [], block).deficit(ritz_values, residuals)
        assert estimate == pytest.approx(safety * (1e-3 + extra) ** 2 / (gap + 1e-3 + extra) / 3, rel=1e-3)


@pytest.mark.parametrize("ascending", [False, True])
def test_as_many_equal_values_as_a_narrow_block_has_columns_hide_others(ascending: bool) -> None:
    ritz_values, residuals = [4.0, 3.0, 3.0, 1.0], [0.0, 1e-4, 2e-4, 0.0]
    if ascending:
        ritz_values, residuals = ritz_values[::-1], residuals[::-1]
    hidden = unresolved(0.5, [0.5], 2).hidden(ritz_values, residuals)
    # the third and the fourth value may be 3 as well
    assert hidden == pytest.approx((3 + SEPARATION * 2e-4 - 1) / 11, rel=1e-2)
    assert unresolved(0.5, [0.6, 0.5], 3).hidden(ritz_values, residuals) == 0.0, "there is room for a third"


def test_values_that_their_residuals_separate_hide_nothing() -> None:
    ritz_values = [4.0, 3.0, 2.999, 1.0]
    for residual, any_hidden in ((1e-3 / SEPARATION * 0.9, False), (1e-3 / SEPARATION * 1.1, True)):
        hidden = unresolved(0.5, [0.5], 2).hidden(ritz_values, [residual] * 4)
        assert (hidden > 0) == any_hidden


def test_a_cluster_across_index_r_hides_values() -> None:
    ritz_values, residuals = [4.0, 3.0, 2.0, 1.0], [1e-4] * 4
    for following, any_hidden in (([1.0, 1.0], True), ([1.0, 0.9], False)):
        hidden = unresolved(0.5, following, 3).hidden(ritz_values, residuals)
        assert hidden == (pytest.approx(SEPARATION * (1e-4 - 4 * ROUNDOFF) / 10, rel=1e-2) if any_hidden else 0.0)


def test_the_errors_of_an_unresolved_cluster_in_a_wide_block_are_of_first_order() -> None:
    ritz_values, residuals = [1.0] * 4, [1e-3] * 4
    for value, first_order in ((1.0, True), (0.5, False)):
        spectrum = unresolved(0.4, [value] * GUARD_VECTORS, 4 + GUARD_VECTORS)
        estimate = spectrum.deficit(ritz_values, residuals)
        assert estimate == pytest.approx(1e-3 if first_order else 2 * 1e-6 / 0.5, rel=1e-2)
        assert spectrum.hidden(ritz_values, residuals) == 0.0


def rule(**changes: float) -> StoppingRule:
    return StoppingRule(**({"rank": 16, "tol": 1e-6, "block": 16, "check_every": 1} | changes))  # type: ignore[arg-type]


def test_no_check_is_due_before_the_guard_vectors_fit_into_the_basis() -> None:
    assert not rule().check_due(2, 1000)
    assert not rule().check_due(3, 16 + GUARD_VECTORS - 1)
    assert rule().check_due(3, 16 + GUARD_VECTORS)


def test_a_deficit_below_the_tolerance_stops_at_once() -> None:
    assert rule().should_stop(3, 1e-6, rank_deficient=False)


def test_after_a_rank_deficient_panel_two_successive_checks_decide() -> None:
    stopping = rule()
    assert not stopping.should_stop(3, 0.0, rank_deficient=True)
    assert stopping.check_due(4, 1000)
    assert not stopping.should_stop(4, 1e-2, rank_deficient=True), "the next panel has found wanted directions"
    assert not stopping.last_step
    assert not stopping.should_stop(8, 1e-8, rank_deficient=True)
    assert stopping.should_stop(9, 1e-8, rank_deficient=True)


def test_the_last_step_is_the_one_that_is_expected_to_reach_the_tolerance() -> None:
    stopping = rule()
    assert not stopping.should_stop(3, 1e-3, rank_deficient=False)
    assert not stopping.last_step, "the reduction per step is not known yet"
    assert not stopping.should_stop(4, 1e-5, rank_deficient=False)
    assert stopping.last_step
    slower = rule()
    for step, deficit in ((3, 1e-4), (4, 5e-5), (5, 2.5e-5)):
        assert not slower.should_stop(step, deficit, rank_deficient=False)
    assert not slower.last_step


def test_checks_are_skipped_while_more_steps_are_certain_to_be_needed() -> None:
    stopping = rule()
    deficit = 1e-6 / FASTEST_DECAY**4.5
    assert not stopping.should_stop(3, deficit, rank_deficient=False)
    assert stopping.next_check == 3 + 3, "four steps are needed even at the fastest decay"


@pytest.mark.parametrize("check_every", [1, 2, 3])
def test_check_every_spaces_the_checks(check_every: int) -> None:
    stopping = rule(check_every=check_every)
    for step, deficit in ((3, 1e-5), (4, 9e-6)):
        assert not stopping.should_stop(step, deficit, rank_deficient=False)
    assert stopping.next_check <= 4 + check_every
    assert stopping.next_check >= 5


def test_a_narrow_block_reduces_the_deficit_more_slowly() -> None:
    assert rule(block=4).fastest == pytest.approx(FASTEST_DECAY**0.25)
    assert rule(block=64).fastest == FASTEST_DECAY


@pytest.mark.parametrize("block", [4, 8, 16, 32])
@pytest.mark.parametrize("rank", [4, 16, 64])
def test_the_steps_to_the_next_check_are_the_fewest_after_which_one_is_due(block: int, rank: int) -> None:
    rule = StoppingRule(rank, 1e-6, block, check_every=4)
    step, size = 0, 0
    for deficit in (1e-1, 1e-3, 1e-4):
        count = rule.steps_to_check(step, size)
        due = [rule.check_due(step + more, size + more * block) for more in range(1, count + 1)]
        assert due == [False] * (count - 1) + [True]
        step, size = step + count, size + count * block
        assert not rule.should_stop(step, deficit, False)
