"""The cost model chooses what is measured to be fast, and nothing that does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.harness.paths import RESULTS
from bench.harness.rows import read_rows
from pissa_kernels.svd import cost
from pissa_kernels.svd.krylov import GUARD_VECTORS, steps_for_niter


@pytest.mark.parametrize(
    ("m", "n", "rank", "niter", "method"),
    [
        # measured on two AVX2 cores, the next best in brackets, ms: 6.0 (gram 8.3)
        (384, 384, 16, None, "chebyshev"),
        # 8.9 (chebyshev 10.5), 12.6 (chebyshev 21)
        (384, 384, 64, None, "gram"),
        (384, 384, 128, None, "gram"),
        # 27 (krylov 30), 61 (chebyshev 73), 90 (chebyshev 150), 252 (chebyshev 314)
        (2304, 768, 16, None, "chebyshev"),
        (1536, 1536, 16, None, "krylov"),
        (2048, 2048, 16, None, "krylov"),
        (2048, 2048, 128, None, "krylov"),
        (4096, 4096, 16, None, "krylov"),
        (4096, 4096, 128, None, "krylov"),
        (4096, 4096, 1500, None, "gram"),
        (4096, 4096, 3000, None, "svd"),
        (64, 64, 8, None, "svd"),
        (128, 128, 16, None, "gram"),
        (256, 256, 128, None, "svd"),
        (64, 64, 64, None, "svd"),
        (1, 1, 1, None, "svd"),
        (4096, 4096, 16, 4, "krylov"),
        (128256, 4096, 16, 4, "krylov"),
    ],
)
def test_the_choice_on_a_cpu(m: int, n: int, rank: int, niter: int | None, method: str) -> None:
    assert cost.plan(m, n, rank, niter).method == method


def test_small_eigenproblems_decide_on_a_gpu() -> None:
    assert cost.plan(4096, 4096, 128, None, device="cuda").method == "chebyshev"
    assert cost.plan(4096, 4096, 128, None, device="cpu").method == "krylov"


def test_a_stack_shares_what_is_small() -> None:
    for plan in (plan for plan in cost.candidates(384, 384, 16, None, batch=24) if plan.method != "svd"):
        alone = [p for p in cost.candidates(384, 384, 16, None) if (p.method, p.block) == (plan.method, plan.block)]
        assert plan.seconds < max(p.seconds for p in alone)


def test_without_leaves_methods_out() -> None:
    assert cost.plan(4096, 4096, 16, None, without=["krylov"]).method == "chebyshev"
    assert cost.plan(4096, 4096, 16, None, without=["krylov", "chebyshev"]).method == "gram"


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 20000),
    extra=st.integers(0, 100000),
    fraction=st.floats(0, 1),
    niter=st.sampled_from([None, 0, 1, 4, 16]),
    device=st.sampled_from(["cpu", "cpu csrc", "cuda", "mps"]),
    batch=st.sampled_from([1, 16]),
)
def test_every_candidate_fits(n: int, extra: int, fraction: float, niter: int | None, device: str, batch: int) -> None:
    rank = 1 + int(fraction * (n - 1))
    plans = cost.candidates(n + extra, n, rank, niter, device=device, batch=batch)
    assert {"gram", "svd"} & {plan.method for plan in plans}, "a dense method is always there to fall back to"
    for plan in plans:
        assert plan.seconds > 0
        if plan.method == "krylov":
            assert plan.limit + plan.block <= n
            if niter is None:
                assert plan.limit >= rank + GUARD_VECTORS + 2 * plan.block, "room for what a restart keeps"
                assert plan.limit >= rank + GUARD_VECTORS + 2 * rank, "and for a second run from the vectors found"
            else:
                assert plan.steps == steps_for_niter(niter)
                assert plan.block >= rank + GUARD_VECTORS
                assert plan.limit >= (plan.steps + 1) * plan.block
        if plan.method == "chebyshev":
            assert niter is None
            assert rank + GUARD_VECTORS <= plan.block < n


def test_the_workspace_is_an_upper_estimate_of_what_was_measured() -> None:
    """Against the peaks in the committed rows; what the process itself adds is a few MiB where weights are small."""
    rows = read_rows(RESULTS / "init-cpu.jsonl")
    measured = [row for row in rows if row["provider"] == "ours pissa" and row["peak_extra_mib"] is not None]
    assert len(measured) >= 5
    for row in measured:
        estimate = cost.workspace(*row["shape"], row["rank"], None, device="cpu") / 2**20
        assert row["peak_extra_mib"] <= estimate <= 2 * row["peak_extra_mib"] + 10, row["case"]
