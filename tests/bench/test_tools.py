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
from bench.harness.paths import RESULTS
from bench.harness.rows import read_rows
from bench.harness.table import table
from bench.initializers.cases import Case
from bench.tools import calibrate, plot, split
from bench.tools.table import tables, totals
from pissa_kernels.svd import machines


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
    # a Chebyshev round has its small problem and its orthonormalization in the call with its product
    absent = {"small problems", "orthonormalization"} if certificate.method == "chebyshev" else set()
    assert {part for part, seconds in clock.seconds.items() if seconds == 0} <= absent
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


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_kind_of_row_has_its_own_table(path, capsys):
    assert main(["table", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = read_rows(path)
    columns = {"kernels-cpu": "of copy", "checkpoint-cpu": "wall s", "quantized-cpu": "nuclear"}
    column = columns.get(path.stem, "energy deficit")
    assert column in printed.splitlines()[0]
    assert all(row["case"] in printed and row["provider"] in printed for row in rows)


def test_rows_of_several_kinds_get_a_table_each():
    first, second = (read_rows(RESULTS / f"{name}-cpu.jsonl") for name in ("kernels", "init"))
    assert tables([first[0], second[0], first[1]]) == tables(first[:2]) + "\n\n" + tables(second[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "--totals", str(RESULTS / "kernels-cpu.jsonl")], "totals are those of initializers and models"),
        (["table", str(RESULTS / "no such file")], "No such file"),
        (["plot", str(RESULTS / "model-cpu.jsonl"), "x.png"], "only rows of initializers can be plotted"),
    ],
)
def test_a_tool_explains_why_it_cannot_read_rows(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_row_of_no_known_kind_is_named():
    with pytest.raises(ValueError, match="'strange'"):
        tables([{"case": "strange", "provider": "x", "ok": True}])


def test_constants_are_fitted_to_times():
    terms = [(n, n**2, n**3) for n in (8, 32, 128, 512)]
    assert calibrate.fitted(terms, [3e-6 * n + 2e-9 * n**3 for n, *_ in terms]) == pytest.approx(
        [3e-6, 0, 2e-9], abs=1e-12
    )


def test_calibration_prints_entries_of_the_cost_model(capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "SIZES", (256, 512))
    monkeypatch.setattr(calibrate, "COLUMNS", (8, 128))
    monkeypatch.setattr(calibrate, "GRAMS", ((64, 32),))
    monkeypatch.setattr(calibrate, "EIGENPROBLEMS", (8, 16, 24))
    assert calibrate.main("calibrate", []) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    found = eval("{" + "".join(lines) + "}", {"Machine": machines.Machine})
    assert "cpu" in found
    assert set(found) <= set(machines.MACHINES)
    assert all(machine.products > 0 and machine.eigenproblem(100) > 0 for machine in found.values())
