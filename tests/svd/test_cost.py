"""The cost model chooses the method that was measured to be fastest, and only plans that fit."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa_kernels.svd import cost, fixed, machines
from pissa_kernels.svd.krylov import steps_for_niter
from pissa_kernels.svd.stopping import GUARD_VECTORS

from ..support.live import live_bytes

MEASURED = Path(__file__).parents[2] / "bench" / "results" / "init-cpu.jsonl"


@pytest.mark.parametrize(
    ("m", "n", "rank", "niter", "method"),
    [
        # milliseconds on two AVX2 cores, with the next best method in brackets: 6.0 (gram 8.3)
        (384, 384, 16, None, "chebyshev"),
        # 12.6 (chebyshev 21)
        (384, 384, 128, None, "gram"),
        # on two AVX-512 cores, in torch: 7.1 (gram 7.2)
        (384, 384, 64, None, "chebyshev"),
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
        (256, 256, 128, None, "gram"),
        (64, 64, 64, None, "svd"),
        (1, 1, 1, None, "svd"),
        (4096, 4096, 16, 4, "krylov"),
        (128256, 4096, 16, 4, "krylov"),
    ],
)
def test_the_choice_on_a_cpu(m: int, n: int, rank: int, niter: int | None, method: str) -> None:
    assert cost.choose_plan(m, n, rank, niter).method == method


def test_a_gpu_takes_the_method_with_small_eigenproblems() -> None:
    assert cost.choose_plan(4096, 4096, 128, None, machine="cuda").method == "chebyshev"
    assert cost.choose_plan(4096, 4096, 128, None, machine="cpu").method == "krylov"


def test_excluded_methods_are_not_chosen() -> None:
    assert cost.choose_plan(4096, 4096, 16, None, exclude=["krylov"]).method == "chebyshev"
    assert cost.choose_plan(4096, 4096, 16, None, exclude=["krylov", "chebyshev"]).method == "gram"


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 20000),
    extra=st.integers(0, 100000),
    fraction=st.floats(0, 1),
    niter=st.sampled_from([None, 0, 1, 4, 16]),
    machine=st.sampled_from([*machines.MACHINES, "mps"]),
)
def test_every_candidate_fits(n: int, extra: int, fraction: float, niter: int | None, machine: str) -> None:
    rank = 1 + int(fraction * (n - 1))
    plans = cost.candidates(n + extra, n, rank, niter, machine=machine)
    assert {"gram", "svd"} & {plan.method for plan in plans}, "a dense method always fits"
    for plan in plans:
        assert plan.seconds > 0
        if plan.method == "krylov":
            assert plan.limit + plan.block <= n
            if niter is None:
                assert plan.limit >= rank + GUARD_VECTORS + 2 * plan.block, "a restart keeps that many columns"
                assert plan.limit >= rank + GUARD_VECTORS + 2 * rank, "a second run starts from the vectors found"
            else:
                assert plan.steps == steps_for_niter(niter)
                assert plan.block >= rank + GUARD_VECTORS
                assert plan.limit >= (plan.steps + 1) * plan.block
        if plan.method == "chebyshev":
            assert niter is None
            assert rank + GUARD_VECTORS <= plan.block < n


def test_the_workspace_is_an_upper_estimate_of_measured_peaks() -> None:
    """Peaks of the committed benchmark rows; the process itself adds a few MiB, which show on small weights."""
    rows = [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines() if line.strip()]
    measured = [row for row in rows if row["provider"] == "ours pissa" and row["peak_extra_mib"] is not None]
    assert len(measured) >= 5
    for row in measured:
        estimate = cost.workspace(*row["shape"], row["rank"], None, machine="cpu") / 2**20
        assert row["peak_extra_mib"] <= estimate <= 2 * row["peak_extra_mib"] + 10, row["case"]


@pytest.mark.parametrize(
    ("shape", "dtype", "further_rounds"),
    [
        ((300, 280), torch.bfloat16, 0),
        pytest.param((300, 280), torch.bfloat16, 1, marks=pytest.mark.slow),
        pytest.param((300, 280), torch.float32, 1, marks=pytest.mark.slow),
        ((640, 200), torch.bfloat16, 1),
    ],
)
def test_the_workspace_of_the_fixed_schedule_is_an_upper_estimate(
    shape: tuple[int, int], dtype: torch.dtype, further_rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tensors that exist at once, in a batch; the same for each of its weights."""
    monkeypatch.setattr(fixed, "FURTHER_ROUNDS", further_rounds)
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2)]
    for rank in (1, 128):
        estimate = len(weights) * fixed.workspace(*shape, rank)
        with live_bytes(*weights) as live:
            solution = fixed.solve(weights, rank, tol=0.0, seed=0)
        assert live.peak <= estimate, rank
        if fixed.schedule(shape[1], rank).degrees and further_rounds:  # type: ignore[union-attr]
            assert estimate <= (2.5 if dtype == torch.bfloat16 else 3) * live.peak, rank
        del solution
        gc.collect()
        assert live.now <= 0, "a tensor of the solution is kept"
