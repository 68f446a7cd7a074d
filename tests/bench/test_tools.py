"""Tools that read rows, tables and plots, and the split of the time."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("tabulate")
pytest.importorskip("matplotlib")

import pissa_kernels
from bench.__main__ import main
from bench.harness.table import table
from bench.initializers.cases import Case
from bench.tools import plot, split
from bench.tools.table import totals


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
        for family in plot.COLORS:
            plot._join(panel, family, group)
        (line,) = panel.get_lines()
        assert list(line.get_xdata()) == [4.0, 8.0]
        assert list(line.get_ydata()) == [1e-3, plot.FLOOR]
    finally:
        plot.plt.close(figure)


def made_row(provider, best, deficit, **more):
    fields = {"case": "c", "model": "m", "shape": [8, 4], "rank": 2, "dtype": "bf16", "spectrum": "mix"}
    fields |= {"fan_in_fan_out": False, "provider": provider, "ok": True, "reason": None, "peak_extra_mib": 12.34}
    return fields | {"min_ms": best, "median_ms": best, "p80_ms": best, "energy_deficit": deficit} | more


def test_table_shows_ratios_to_ours():
    rows = [made_row("ours pissa", 20.0, 1e-7), made_row("peft pissa", 5000.0, 1e-12, peak_extra_mib=None)]
    lines = table(rows, "github").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == ["c", "ours pissa", "20.0", "1.00", "1.0e-07", "12.3"]
    assert cells[1] == ["", "peft pissa", "5000", "250.00", "1.0e-12", "–"]
    only_peft = table(rows[1:], "github").splitlines()[2]
    assert [cell.strip() for cell in only_peft.strip("|").split("|")][3] == "–"


def test_plot_draws_green_rows(quick, tmp_path, monkeypatch):
    image = tmp_path / "plot.png"
    assert main(["plot", str(quick.path), str(image)]) == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr(plot, "_draw", lambda panel, row: drawn.append(row["provider"]) or plot.Line2D([], []))
    red = made_row("peft pissa", None, 0.9, ok=False)
    plot.plot([made_row("ours pissa", 20.0, 1e-7), red], image)
    assert drawn == ["ours pissa"]
    with pytest.raises(ValueError, match="no row has a time"):
        plot.plot([red], image)
