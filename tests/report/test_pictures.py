"""Pictures: they show the numbers of the report, and their labels are complete and do not overlap."""

from __future__ import annotations

import os
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pissa_kernels import Report
from pissa_kernels.report.spectrum import cumulative_energy, least_rank

from ..support.marks import slow_but
from ..support.reports import LLAMA, layer, llama, power_law

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg

from pissa_kernels.report.curves import ranks_figure, spectra_figure
from pissa_kernels.report.pictures import draw, energy_figure

SMALL, LARGE = llama(2, LLAMA[:4]), llama(32, extra=["lm_head"])
FIGURES = (energy_figure, spectra_figure, ranks_figure)
ZERO = layer("model.layers.0.q", (0.0, 0.0, 0.0), 1.0)


def titled(figure: Any) -> dict[str, Any]:
    """Panels by the first line of their title."""
    return {axes.get_title().partition("\n")[0]: axes for axes in figure.axes if axes.get_title()}


def curves(axes: Any, rank: int) -> list[Any]:
    """The lines over 1 … rank, without the marks of a share."""
    return [line.get_ydata() for line in axes.lines if list(line.get_xdata()) == list(range(1, rank + 1))]


@pytest.mark.parametrize("report", [SMALL, LARGE], ids=["2x4", "32x7"])
def test_energy_shows_the_numbers_of_the_report(report: Report) -> None:
    axes, bar = energy_figure(report).axes
    shown = axes.images[0].get_array()
    rows = [text.get_text() for text in axes.get_yticklabels()]
    columns = [text.get_text() for text in axes.get_xticklabels()]
    assert len(columns) == shown.shape[1], "every depth is labelled"
    expected = {entry.name: 100 * entry.certificate.energy for entry in report.layers}
    found = {
        row if column == "–" else f"model.layers.{column}.{row}": shown[y, x]
        for y, row in enumerate(rows)
        for x, column in enumerate(columns)
        if not np.ma.is_masked(shown[y, x])
    }
    assert found == expected
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(texts) == len(expected)
    assert all(texts[x, y] == f"{shown[y, x]:.1f}" for x, y in texts)
    assert bar.get_xlabel() == "captured energy, % of ‖W‖²"
    assert axes.images[0].get_clim() == (min(expected.values()), max(expected.values()))
    assert f"rank {report.layers[0].rank}" in axes.get_title()
    assert axes.get_xlabel().startswith("depth")


def test_spectra_show_the_numbers_of_the_report() -> None:
    figure = spectra_figure(LARGE)
    panels = titled(figure)
    assert list(panels) == [*LLAMA, "lm_head"]
    for name, axes in panels.items():
        assert axes.get_yscale() == "log"
        entries = [entry for entry in LARGE.layers if entry.name.endswith(name)]
        for line, entry in zip(curves(axes, 16), entries, strict=True):
            sigma = entry.singular_values.double().numpy()
            np.testing.assert_array_equal(line, sigma / sigma[0])
    assert figure.get_supylabel() == "σᵢ / σ₁"
    assert panels["lm_head"].get_xlabel() == "index i"


def test_ranks_show_the_numbers_of_the_report() -> None:
    shares = (0.5, 0.9)
    figure = ranks_figure(LARGE, shares)
    for name, axes in titled(figure).items():
        entries = [entry for entry in LARGE.layers if entry.name.endswith(name)]
        for line, entry in zip(curves(axes, 16), entries, strict=True):
            np.testing.assert_array_equal(line, 100 * cumulative_energy(entry).numpy())
        most = [max(least_rank(entry, share) or 0 for entry in entries) for share in shares]
        assert axes.get_title() == f"{name}\nr = {most[0]}, {most[1]}"
        marked = [
            line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
        ]
        assert marked == most
        dots = [line for line in axes.lines if line.get_marker() == "."]
        for share, line in zip(shares, dots, strict=True):
            assert list(line.get_xdata()) == [least_rank(entry, share) for entry in entries]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [word for text in words for word in text.split() if word.isdigit()] == ["50", "90"]
    assert figure.get_supylabel() == "captured energy, % of ‖W‖²"
    assert not ranks_figure(SMALL, ()).legends


def test_color_stands_for_the_depth() -> None:
    for report, depths in ((SMALL, 2), (LARGE, 32)):
        figure = spectra_figure(report)
        bar = figure.axes[-1]
        assert bar.get_ylabel().startswith("depth")
        for name in LLAMA[:4]:
            colors = [line.get_color() for line in titled(figure)[name].lines]
            assert len(set(colors)) == depths
            light = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue, _ in colors]
            assert light == sorted(light), "from dark to light, which a gray print shows too"
    assert [text.get_text() for text in spectra_figure(SMALL).axes[-1].get_yticklabels()] == ["0", "1"]


def boxes(figure: Any) -> list[tuple[str, Any]]:
    """Every drawn text, with its bounding box in pixels."""
    renderer = figure.canvas.get_renderer()
    texts = [text for axes in figure.axes for text in (*axes.texts, axes.title)]
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            low, high = sorted(limits)
            texts.append(axis.label)
            # matplotlib keeps ticks beyond the limits and does not draw them.
            for tick in axis.get_major_ticks():
                texts += [tick.label1, tick.label2] if low <= tick.get_loc() <= high else []
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    texts += [text for text in (figure._suptitle, figure._supxlabel, figure._supylabel) if text is not None]
    return [
        (text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_visible() and text.get_text()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("report", [SMALL, LARGE, llama(80)], ids=["2x4", "32x7", "80x7"])
@pytest.mark.parametrize("make", FIGURES)
def test_texts_do_not_overlap(make: Any, report: Report) -> None:
    figure = make(report, (0.5, 0.9, 0.99)) if make is ranks_figure else make(report)
    FigureCanvasAgg(figure).draw()
    found, page = boxes(figure), figure.bbox.padded(1)
    assert len(found) > 10
    for text, box in found:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, text
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, text
    assert not [
        (one, other) for (one, a), (other, b) in combinations(found, 2) if a.padded(-0.5).overlaps(b.padded(-0.5))
    ]


def test_narrow_cells_have_no_numbers() -> None:
    axes = energy_figure(llama(80)).axes[0]
    assert not axes.texts
    labels = [int(text.get_text()) for text in axes.get_xticklabels()]
    assert labels[0] == 0
    assert {after - before for before, after in pairwise(labels)} == {2}


@pytest.mark.parametrize("make", FIGURES)
@pytest.mark.filterwarnings("error")
def test_corners(make: Any) -> None:
    """One layer, one rank, zeros, no depth and long names are drawn without a warning."""
    reports = [
        Report([layer("lm_head", (2.0,))]),
        Report([layer("model.layers.0.q", (2.0,))]),
        Report([ZERO]),
        Report([ZERO, layer("model.layers.1.q")]),
        Report([layer("q", (1.0, 0.0))]),
        Report([layer("a.0.q", (3.0, 2.0)), layer("a.1.q", (5.0,)), layer("a.1." + 30 * "long_name.")]),
        power_law([f"{stack}.block.{depth}.q" for stack in ("encoder", "decoder") for depth in range(3)]),
        power_law(["Linear"] * 5),
    ]
    for report in reports:
        FigureCanvasAgg(make(report)).draw()
    with pytest.raises(ValueError, match="no layer was initialized, so there is nothing to show"):
        make(Report())


def test_zeros_are_labeled_and_not_drawn() -> None:
    figure = spectra_figure(Report([ZERO, layer("model.layers.1.q", (4.0, 0.0))]))
    axes = titled(figure)["q"]
    zero, other = axes.lines
    assert np.isnan(zero.get_ydata()).all()
    np.testing.assert_array_equal(other.get_ydata(), [1.0, np.nan])
    assert [text.get_text() for text in axes.texts] == ["σ = 0 at depth 0"]
    held = titled(ranks_figure(Report([ZERO])))["q"].lines[0].get_ydata()
    assert list(held) == [100, 100, 100]
    assert energy_figure(Report([ZERO])).axes[0].texts[0].get_text() == "100"


def test_equal_energies_make_no_pattern() -> None:
    report = Report([layer(f"h.{depth}.q", energy=0.5 + 1e-9 * depth) for depth in range(3)])
    image = energy_figure(report).axes[0].images[0]
    low, high = image.get_clim()
    assert high - low == pytest.approx(1.0)
    assert low < 50 < high


def test_long_names_keep_their_end() -> None:
    label = energy_figure(Report([layer("x." * 40 + "q_proj")])).axes[0].get_yticklabels()[0].get_text()
    assert label.startswith("…")
    assert label.endswith("x.q_proj")
    assert len(label) == 36


@pytest.mark.parametrize("name", ["model.$a_$.q_proj", "model.0.$\\frac{x$_proj", "$.q"])
def test_names_are_not_mathematical_notation(name: str, tmp_path: Path) -> None:
    report = Report([layer(name), layer("model.0.k_proj")])
    label = energy_figure(report).axes[0].get_yticklabels()[0].get_text()
    assert label.replace(r"\$", "$") in name
    drawn = draw(report, tmp_path, suffix="svg")
    assert all(path.stat().st_size > 0 for path in drawn)


def test_draw_writes_three_files(tmp_path: Path) -> None:
    written = draw(SMALL, tmp_path / "a" / "b")
    assert [path.name for path in written] == ["energy.png", "spectra.png", "ranks.png"]
    assert sorted((tmp_path / "a" / "b").iterdir()) == sorted(written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    vector = draw(SMALL, str(tmp_path), suffix="svg")
    assert [path.name for path in vector] == ["energy.svg", "spectra.svg", "ranks.svg"]
    assert all("<svg" in path.read_text() for path in vector)


@pytest.mark.parametrize("suffix", slow_but(["png", "svg", "pdf"], "png"))
def test_only_its_own_pictures_are_replaced(suffix: str, tmp_path: Path) -> None:
    drawn = draw(SMALL, tmp_path, suffix=suffix)
    os.link(drawn[0], tmp_path / "kept")
    before = (tmp_path / "kept").read_bytes()
    draw(Report([layer("another")]), tmp_path, suffix=suffix)
    assert (tmp_path / "kept").read_bytes() == before, "a second name keeps its bytes"
    assert drawn[0].read_bytes() != before
    figure = energy_figure(SMALL)
    figure.savefig(drawn[2])  # as a user draws
    (tmp_path / "weights").write_text("weights")
    drawn[1].unlink()
    drawn[1].symlink_to("weights")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=rf"spectra.{suffix} exists and is not a picture of a report"):
        draw(SMALL, tmp_path, suffix=suffix)
    drawn[1].unlink()
    with pytest.raises(FileExistsError, match=rf"ranks.{suffix} exists and is not a picture of a report"):
        draw(SMALL, tmp_path, suffix=suffix)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {
        path: content for path, content in before.items() if path != drawn[1]
    }


def test_nothing_is_written_for_a_report_that_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer"):
        draw(Report(), tmp_path / "out")
    with pytest.raises(ValueError, match="at most 1"):
        draw(SMALL, tmp_path / "out", shares=(90.0,))
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'pissa-kernels\[report\]'"):
        draw(SMALL, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
