"""Pictures of a report: energy over the model, spectra, and what lower ranks would have captured.

matplotlib is imported when a picture is asked for, and only its figures are used: no pyplot, no window, no global
state. Colours are of viridis, which grows evenly in lightness and reads under every kind of colour vision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .curves import ranks_figure, spectra_figure
from .figures import new_figure, shorten
from .names import Grid, arrange
from .report import Report

__all__ = ["draw", "energy_figure", "ranks_figure", "spectra_figure"]

# Up to here a cell of the heat map has room for its number; more columns get narrow cells.
ANNOTATED_DEPTHS = 48
WIDE_CELL, NARROW_CELL, ROW = 0.36, 0.16, 0.34  # inches
# Depths that are labelled at the most.
DEPTH_LABELS = 48
DPI = 160


def draw(report: Report, folder: str | Path, shares: Sequence[float] = (0.9,), suffix: str = "png") -> list[Path]:
    """Draw energy, spectra and ranks into a folder, which is created.

    Args:
        report: with at least one layer.
        folder: for energy.png, spectra.png and ranks.png; files of these names are replaced.
        shares: of the captured energy, to mark the ranks of; each above 0 and at most 1.
        suffix: "png", "svg" or another format of matplotlib's.

    Returns:
        The files, in that order.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
        OSError: the folder cannot be written.
        ValueError: no layer, or a share out of range.
    """
    figures = {
        "energy": energy_figure(report),
        "spectra": spectra_figure(report),
        "ranks": ranks_figure(report, shares),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=DPI)
    return paths


def energy_figure(report: Report) -> Any:
    """Heat map of the captured energy in % of ‖W‖_F²: a row for each projection, a column for each depth.

    Returns:
        A ``matplotlib.figure.Figure`` whose first axes hold the map; a cell without a layer is masked, and grey.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer.
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
    low, high = _colour_range(values)
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=high, aspect="auto")
    if annotated:
        _annotate(axes, image, values)
    _label_cells(axes, grid, labels)
    ranks = sorted({layer.rank for layer in report.layers})
    axes.set_title(
        "Energy captured at rank " + " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))), fontsize=11
    )
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.1, pad=0.02, aspect=max(15, 7 * width))
    bar.set_label("captured energy, % of ‖W‖²", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _colour_range(values: Any) -> tuple[float, float]:
    """From the least to the most, but never less than one per cent wide, so that rounding makes no pattern."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    missing = max(0.0, 1.0 - (high - low)) / 2
    return low - missing, high + missing


def _annotate(axes: Any, image: Any, values: Any) -> None:
    """Each cell's number, in black or white, whichever stands out."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5  # luma, ITU-R BT.601
            text = f"{value:.1f}" if value < 99.95 else "100"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color="black" if light else "white")


def _label_cells(axes: Any, grid: Grid, labels: Sequence[str]) -> None:
    """Depths below, projections to the left, white lines between the cells."""
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
        axes.set_xlabel("depth" + (" (–: outside of the stack)" if None in grid.depths else ""), fontsize=9)
