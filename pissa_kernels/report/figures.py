"""What the pictures share: figures without pyplot, short labels, a grid of panels coloured by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .layer import LayerReport
from .names import Grid

# Longer labels lose their beginning: their end tells more.
LABEL_LENGTH = 36
COLUMNS = (4, 3)
PANEL_WIDTH, PANEL_HEIGHT, LINE = 2.6, 2.0, 0.17  # inches
# viridis's yellow end is too light for a line on white
LIGHTEST_LINE = 0.88
NO_DEPTH_COLOUR = "#4d4d4d"
DEPTH_LABELS = 17


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of so many inches that lays itself out.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"drawing needs matplotlib ({error}): pip install 'pissa-kernels[report]'", name="matplotlib"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def shorten(label: str) -> str:
    """The label's end, where it is too long, as matplotlib takes a text that is no mathematics."""
    end = label if len(label) <= LABEL_LENGTH else "…" + label[1 - LABEL_LENGTH :]
    return end.replace("$", r"\$")


def panels(
    grid: Grid,
    curve: Callable[[LayerReport], Any],
    index_label: str,
    notes: Mapping[str, str] | None = None,
    lines_below: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """A figure with a panel for each projection, in it a line over 1 … r for each depth, and a bar of the depths.

    Args:
        grid: of the report's layers.
        curve: (r,) ordinates of a layer.
        index_label: below the panels at the bottom.
        notes: a second line of a panel's title.
        lines_below: of text to leave room for, beneath the panels.

    Returns:
        The figure, and the axes by projection, all to one scale.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # the widest grid, or the one that leaves fewer corners empty
    count = len(grid.projections)
    columns = min(count, min(COLUMNS, key=lambda width: -count % width) if count > max(COLUMNS) else count)
    rows = math.ceil(count / columns)
    height = PANEL_HEIGHT * rows + LINE * (lines_below + (rows if notes else 0)) + 0.9
    figure = new_figure(max(5.6, PANEL_WIDTH * columns + 1.1), height)
    cells = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    axes = dict(zip(grid.projections, cells, strict=False))
    colours = _depth_colours(grid)
    for projection, panel in axes.items():
        for depth, layer in grid.of(projection):
            values = curve(layer)
            # a single point makes no line
            marker = "o" if layer.rank == 1 else None
            index = range(1, layer.rank + 1)
            panel.plot(index, values, color=colours[depth], linewidth=1.1, marker=marker, markersize=4, label=depth)
        note = f"\n{notes[projection]}" if notes else ""
        panel.set_title(shorten(projection) + note, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for number, cell in enumerate(cells):
        if number >= len(axes):
            cell.remove()
        elif number + columns >= len(axes):
            cell.tick_params(labelbottom=True)
            cell.set_xlabel(index_label, fontsize=9)
    cells[0].set_xlim(0.5, 1.01 * max(layer.rank for layer in grid.layers.values()) + 0.49)
    cells[0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _depth_bar(figure, list(axes.values()), grid, colours)
    return figure, axes


def _depth_colours(grid: Grid) -> dict[int | None, Any]:
    """A shade of viridis for each depth, from dark to light; grey for layers without one."""
    from matplotlib import colormaps

    depths = [depth for depth in grid.depths if depth is not None]
    last = max(1, len(depths) - 1)
    colours: dict[int | None, Any] = {None: NO_DEPTH_COLOUR}
    for index, depth in enumerate(depths):
        colours[depth] = colormaps["viridis"](LIGHTEST_LINE * index / last)
    return colours


def _depth_bar(figure: Any, axes: Sequence[Any], grid: Grid, colours: Mapping[int | None, Any]) -> None:
    """A colour bar with one step for each depth; one depth needs none."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    depths = [depth for depth in grid.depths if depth is not None]
    if len(depths) < 2:
        return
    norm = BoundaryNorm([index - 0.5 for index in range(len(depths) + 1)], len(depths))
    shades = ScalarMappable(norm, ListedColormap([colours[depth] for depth in depths]))
    shown = range(0, len(depths), math.ceil(len(depths) / DEPTH_LABELS))
    bar = figure.colorbar(shades, ax=axes, fraction=0.03, pad=0.02, aspect=max(12, 3 * len(axes)))
    bar.set_ticks(list(shown), labels=[str(depths[index]) for index in shown])
    bar.ax.tick_params(labelsize=8, length=0, which="both")
    bar.outline.set_visible(False)
    grey = " (grey: outside of the stack)" if None in grid.depths else ""
    bar.set_label(f"depth{grey}", fontsize=9)
