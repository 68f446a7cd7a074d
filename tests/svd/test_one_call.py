"""Chebyshev's iteration in one call of csrc against the same one step by step: bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.svd import TruncatedSVD, cost
from pissa_kernels.svd import driver as svd
from pissa_kernels.svd.weight_operator import WeightOperator

from ..support.reference import KINDS, matrix, realistic

pytestmark = pytest.mark.skipif(
    pk.ops.backend("chebyshev_filter", torch.ones(2, 2)) != "csrc",
    reason="csrc is not built, or slower than torch here",
)


def both(W: Tensor, rank: int, gram: bool, steps: int = 100, **options: float) -> list[TruncatedSVD]:
    """The result in one call, and step by step."""

    def plan(m: int, n: int, *_: object, exclude: object = (), **__: object) -> cost.SolverPlan:
        plans = cost.candidates(m, n, rank, None, machine="cpu")
        return replace(next(plan for plan in plans if plan.method == "chebyshev"), through_gram=gram)

    found = []
    one_call = WeightOperator.chebyshev
    iterate: Callable[..., tuple[object, bool]] = svd._iterate
    for body in (one_call, lambda *_: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(svd, "choose_plan", plan)
            patch.setattr(svd, "MAX_STEPS", steps)
            # one iteration decides, whatever it finds
            patch.setattr(svd, "ITERATIONS", ("chebyshev",))
            patch.setattr(WeightOperator, "chebyshev", body)
            patch.setattr(svd, "_iterate", lambda *arguments: (iterate(*arguments)[0], True))
            found.append(pk.truncated_svd(W, rank, **options))  # type: ignore[arg-type]
    return found


def assert_equal_bits(one: TruncatedSVD, other: TruncatedSVD) -> None:
    for a, b in zip(one[:3], other[:3], strict=True):
        assert torch.equal(a, b)
    assert one.certificate == other.certificate


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(100, 420),
    n=st.integers(100, 420),
    rank=st.sampled_from([1, 7, 16, 24]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gram=st.booleans(),
    tol=st.sampled_from([1e-3, 2.5e-6, 1e-8]),
    seed=st.integers(0, 99),
)
def test_any_matrix(
    m: int, n: int, rank: int, kind: str, dtype: torch.dtype, gram: bool, tol: float, seed: int
) -> None:
    W = matrix(kind, m, n, seed).to(dtype)
    assert_equal_bits(*both(W, rank, gram, tol=tol, seed=seed))


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("steps", [1, 6, 12])
def test_an_iteration_that_ends_before_it_converges(gram: bool, steps: int) -> None:
    W = torch.randn(600, 500, generator=torch.Generator().manual_seed(0))
    assert_equal_bits(*both(W, 16, gram, steps))


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("rank", [16, 64])
def test_real_spectra(rank: int, gram: bool) -> None:
    for shape in ((700, 500), (500, 700)):
        for dtype in (torch.float32, torch.bfloat16):
            one, other = both(realistic(*shape).to(dtype), rank, gram)
            assert_equal_bits(one, other)
            assert one.certificate.converged


def test_a_weight_of_extreme_scale_is_solved_step_by_step() -> None:
    W = realistic(300, 300).float() * 1e-30
    assert WeightOperator(W).chebyshev(None, 4, 32, 1e-6, 100, 0) is None
    result = both(W, 4, gram=False)[0]
    assert result.certificate.converged


def test_it_needs_csrc(monkeypatch: pytest.MonkeyPatch) -> None:
    W = realistic(300, 300).float()
    assert WeightOperator(W).chebyshev(None, 4, 32, 1e-6, 100, 0) is not None
    monkeypatch.setenv("PISSA_KERNELS_BACKEND", "torch")
    assert WeightOperator(W).chebyshev(None, 4, 32, 1e-6, 100, 0) is None
