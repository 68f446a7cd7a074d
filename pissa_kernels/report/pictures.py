"""Pictures of a report: captured energy over the model, spectra, and the energy that lower ranks would have captured.

matplotlib is imported when a picture is drawn. Only its figures are used: no pyplot, no window, no global state. The
colors are from viridis, whose lightness increases evenly and which is readable with every kind of color vision.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files.atomic import atomic_file, check_writable_target
from .curves import ranks_figure, spectra_figure
from .figures import new_figure, shorten
from .layer import rank_range
from .names import Grid, arrange
from .report import Report

# Columns up to which a cell of the heat map shows its number; with more columns the cells are narrower.
ANNOTATED_DEPTHS = 48
WIDE_CELL, NARROW_CELL, ROW = 0.36, 0.16, 0.34  # inches
# Most depths that get a label.
DEPTH_LABELS = 48
DPI = 160
# In the metadata of a picture, so that no other picture is replaced; the keys are matplotlib's, by format.
DRAWN_BY = "pissa-kernels report"
MARKED_BY = {"png": "Software", "svg": "Creator", "pdf": "Creator"}


def draw(report: Report, folder: str | Path, shares: Sequence[float] = (0.9,), suffix: str = "png") -> list[Path]:
    """Draw energy, spectra and ranks into a folder, which is created if necessary.

    Args:
        report: a report with at least one layer.
        folder: folder of energy.png, spectra.png and ranks.png. Files of these names that this function drew are
            replaced.
        shares: shares of the captured energy whose ranks are marked, each above 0 and at most 1.
        suffix: "png", "svg" or another format of matplotlib's.

    Returns:
        The paths of the files.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
        FileExistsError: ``folder`` is a file, or one of the names is taken by something else. Nothing is drawn then.
        OSError: the folder cannot be written.
        ValueError: the report has no layer, or a share is out of range.
    """
    figures = report_figures(report, shares)
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise FileExistsError(f"{folder} exists and is not a folder; give the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for name in figures]
    places = [check_writable_target(path, "a picture of a report", _is_drawn) for path in paths]
    mark = {MARKED_BY[suffix]: DRAWN_BY} if suffix in MARKED_BY else None
    for place, figure in zip(places, figures.values(), strict=True):
        with atomic_file(place) as temporary:
            figure.savefig(temporary, format=suffix, dpi=DPI, metadata=mark)
    return paths


def _is_drawn(path: Path) -> bool:
    return DRAWN_BY.encode() in path.read_bytes()


def report_figures(report: Report, shares: Sequence[float] = (0.9,)) -> dict[str, Any]:
    """The figures "energy", "spectra" and "ranks", with the arguments and errors of :func:`draw`."""
    return {
        "energy": energy_figure(report),
        "spectra": spectra_figure(report),
        "ranks": ranks_figure(report, shares),
    }


def energy_figure(report: Report) -> Any:
    """Heat map of the captured energy in % of ‖W‖_F²: a row for each projection, a column for each depth.

    Returns:
        A ``matplotlib.figure.Figure`` whose first axes hold the map. A cell without a layer is masked and gray.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no layer.
    """
    grid = arrange(report.layers)
    values = np.full((len(grid.projections), len(grid.depths)), np.nan)
    for (projection, depth), layer in grid.layers.items():
        values[grid.projections.index(projection), grid.depths.index(depth)] = 100 * layer.certificate.energy
    annotated = len(grid.depths) <= ANNOTATED_DEPTHS
    labels = [shorten(projection) for projection in grid.projections]
    width = max(3.4, (WIDE_CELL if annotated else NARROW_CELL) * len(grid.depths))
    figure = new_figure(width + 0.08 * max(map(len, labels)) + 0.4, max(0.8, ROW * len(labels)) + 1.7)
    axes = figure.add_subplot()
    low, high = _color_range(values)
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=high, aspect="auto")
    if annotated:
        _annotate(axes, image, values)
    _label_cells(axes, grid, labels)
    axes.set_title(f"Energy captured at {rank_range(report.layers)}", fontsize=11)
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.1, pad=0.02, aspect=max(15, 7 * width))
    bar.set_label("captured energy, % of ‖W‖²", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _color_range(values: Any) -> tuple[float, float]:
    """The least and the greatest value, widened to one percentage point so that round-off shows no pattern."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max(0.0, 1.0 - (high - low)) / 2
    return low - margin, high + margin


def _annotate(axes: Any, image: Any, values: Any) -> None:
    """Write each cell's number in black or white, whichever contrasts more."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5  # luma, ITU-R BT.601
            text = f"{value:.1f}" if value < 99.95 else "100"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color="black" if light else "white")


def _label_cells(axes: Any, grid: Grid, labels: Sequence[str]) -> None:
    """Label the columns with depths and the rows with projections, and draw white lines between the cells."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if len(grid.depths) <= step * DEPTH_LABELS)
    shown = [
        (column, "–" if depth is None else str(depth))
        for column, depth in enumerate(grid.depths)
        if column % every == 0 or depth is None
    ]
    if grid.depths == [None]:
        shown = []
    axes.set_xticks([column for column, _ in shown], [text for _, text in shown], fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_xticks(np.arange(0.5, len(grid.depths) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(labels) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0 if len(grid.depths) <= ANNOTATED_DEPTHS else 0.4)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#e6e6e6")
    if shown:
        axes.set_xlabel("depth" + (" (–: outside the stack)" if None in grid.depths else ""), fontsize=9)
