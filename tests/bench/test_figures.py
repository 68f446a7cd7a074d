"""What is made of rows and runs: totals, the split of the time, curves."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("tabulate")
pytest.importorskip("matplotlib")

import pissa_kernels
from bench import plot, split
from bench.cases import Case
from bench.table import totals


def test_totals_sum_over_cases_and_leave_out_who_is_red_in_one():
    def row(case, rank, provider, best, deficit, ok=True):
        return {
            "case": case,
            "rank": rank,
            "provider": provider,
            "min_ms": best,
            "energy_deficit": deficit,
            "ok": ok,
        }

    rows = [
        row("a", 4, "ours pissa", 100.0, 1e-7),
        row("b", 4, "ours pissa", 150.0, 3e-7),
        row("a", 4, "peft pissa", 500.0, 1e-12),
        row("b", 4, "peft pissa", 500.0, 1e-12),
        row("a", 4, "peft pissa_niter_4", 1.0, 1e-2),
        row("b", 4, "peft pissa_niter_4", None, 9e-1, ok=False),
        row("c", 8, "peft pissa", 7.0, 1e-12),
    ]
    lines = [line.split() for line in totals(rows, "plain").splitlines()[1:]]
    assert lines == [
        ["2", "cases,", "rank", "4", "ours", "pissa", "250", "1.00", "3.0e-07"],
        ["peft", "pissa", "1000", "4.00", "1.0e-12"],
        ["1", "cases,", "rank", "8", "peft", "pissa", "7.0", "–", "1.0e-12"],
    ]


def test_a_split_accounts_for_all_of_the_time():
    weight = Case("x", (700, 640), 8).weight()
    unwrapped = torch.linalg.eigh
    with split.clocked("cpu") as clock:
        began = time.perf_counter()
        certificate = pissa_kernels.truncated_svd(weight, 8).certificate
        elapsed = time.perf_counter() - began
    assert torch.linalg.eigh is unwrapped
    assert certificate.method in ("krylov", "chebyshev")
    assert all(seconds > 0 for seconds in clock.seconds.values())
    assert sum(clock.seconds.values()) == pytest.approx(elapsed, rel=0.05, abs=1e-3)
    assert split.split(weight, 8, repeats=1).keys() == clock.seconds.keys()


def test_a_curve_joins_one_familys_rounds_in_order():
    def row(provider, best, deficit):
        return {"provider": provider, "min_ms": best, "energy_deficit": deficit}

    group = [
        row("ours pissa", 9.0, 1e-7),
        row("ours pissa_niter_16", 8.0, 1e-12),
        row("ours pissa_niter_4", 4.0, 1e-3),
        row("peft pissa_niter_4", 5.0, 1e-2),
    ]
    figure, panel = plot.plt.subplots()
    try:
        for family in plot.COLOURS:
            plot._join(panel, family, group)
        (line,) = panel.get_lines()
        assert list(line.get_xdata()) == [4.0, 8.0]
        assert list(line.get_ydata()) == [1e-3, plot.FLOOR]
    finally:
        plot.plt.close(figure)
