"""Parts that the pictures share: figures without pyplot, short labels, a grid of panels colored by depth, data URIs."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

from .layer import LayerReport
from .names import Grid

LABEL_LENGTH = 36  # characters
COLUMNS = (4, 3)
PANEL_WIDTH, PANEL_HEIGHT, LINE = 2.6, 2.0, 0.17  # inches
# The yellow end of viridis is too light for a line on white.
LIGHTEST_LINE = 0.88
NO_DEPTH_COLOR = "#4d4d4d"
DEPTH_LABELS = 17
# Glyphs as paths and inline images make an SVG independent of fonts and other files. A fixed salt makes the ids of its
# elements reproducible; the default salt is random.
SELF_CONTAINED = {"svg.fonttype": "path", "svg.image_inline": True, "svg.hashsalt": "pissa_kernels"}


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` with constrained layout.

    Args:
        width: in inches.
        height: in inches.

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


def svg_data_uri(figure: Any) -> str:
    """A figure as a ``data:`` URI of an SVG image that needs no other file; the same figure gives the same URI."""
    from matplotlib import rc_context

    buffer = StringIO()
    with rc_context(SELF_CONTAINED):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # matplotlib repeats each text in a comment. A layer's name may hold characters that XML does not allow there.
    svg = re.sub("<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    return "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()


def shorten(label: str) -> str:
    """A label for matplotlib: the last characters, which differ most, and no mathematical notation."""
    end = label if len(label) <= LABEL_LENGTH else "…" + label[1 - LABEL_LENGTH :]
    return end.replace("$", r"\$")


def panels(
    grid: Grid,
    curve: Callable[[LayerReport], Any],
    index_label: str,
    notes: Mapping[str, str] | None = None,
    lines_below: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """A figure with a panel for each projection, a line over 1 … r for each depth, and a color bar of the depths.

    Args:
        grid: the report's layers.
        curve: function from a layer to its ordinates, (r,).
        index_label: label of the abscissa.
        notes: second line of each panel's title, by projection; None for none.
        lines_below: lines of text to leave room for below the panels.

    Returns:
        The figure, and the axes by projection, which share their scales.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # The number of columns that leaves fewer cells empty; the larger one if they leave as many.
    count = len(grid.projections)
    columns = min(count, min(COLUMNS, key=lambda width: -count % width) if count > max(COLUMNS) else count)
    rows = math.ceil(count / columns)
    height = PANEL_HEIGHT * rows + LINE * (lines_below + (rows if notes else 0)) + 0.9
    figure = new_figure(max(5.6, PANEL_WIDTH * columns + 1.1), height)
    cells = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    axes = dict(zip(grid.projections, cells, strict=False))
    colors = _depth_colors(grid)
    for projection, panel in axes.items():
        _draw_panel(panel, grid.of(projection), curve, colors)
        panel.set_title(shorten(projection) + (f"\n{notes[projection]}" if notes else ""), fontsize=9)
    for number, cell in enumerate(cells):
        if number >= len(axes):
            cell.remove()
        elif number + columns >= len(axes):
            cell.tick_params(labelbottom=True)
            cell.set_xlabel(index_label, fontsize=9)
    cells[0].set_xlim(0.5, 1.01 * max(layer.rank for layer in grid.layers.values()) + 0.49)
    cells[0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _depth_bar(figure, list(axes.values()), grid, colors)
    return figure, axes


def _draw_panel(
    panel: Any,
    layers: Sequence[tuple[int | None, LayerReport]],
    curve: Callable[[LayerReport], Any],
    colors: Mapping[int | None, Any],
) -> None:
    """Draw a line for each (depth, layer)."""
    for depth, layer in layers:
        # A line through a single point would be invisible.
        marker = "o" if layer.rank == 1 else None
        index = range(1, layer.rank + 1)
        panel.plot(index, curve(layer), color=colors[depth], linewidth=1.1, marker=marker, markersize=4, label=depth)
    panel.tick_params(labelsize=8)
    panel.grid(color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _depth_colors(grid: Grid) -> dict[int | None, Any]:
    """A shade of viridis for each depth, from dark to light; gray for layers without a depth."""
    from matplotlib import colormaps

    depths = [depth for depth in grid.depths if depth is not None]
    last = max(1, len(depths) - 1)
    colors: dict[int | None, Any] = {None: NO_DEPTH_COLOR}
    for index, depth in enumerate(depths):
        colors[depth] = colormaps["viridis"](LIGHTEST_LINE * index / last)
    return colors


def _depth_bar(figure: Any, axes: Sequence[Any], grid: Grid, colors: Mapping[int | None, Any]) -> None:
    """A color bar with one step for each depth, if there is more than one depth."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    depths = [depth for depth in grid.depths if depth is not None]
    if len(depths) < 2:
        return
    norm = BoundaryNorm([index - 0.5 for index in range(len(depths) + 1)], len(depths))
    shades = ScalarMappable(norm, ListedColormap([colors[depth] for depth in depths]))
    shown = range(0, len(depths), math.ceil(len(depths) / DEPTH_LABELS))
    bar = figure.colorbar(shades, ax=axes, fraction=0.03, pad=0.02, aspect=max(12, 3 * len(axes)))
    bar.set_ticks(list(shown), labels=[str(depths[index]) for index in shown])
    bar.ax.tick_params(labelsize=8, length=0, which="both")
    bar.outline.set_visible(False)
    gray = " (gray: outside the stack)" if None in grid.depths else ""
    bar.set_label(f"depth{gray}", fontsize=9)
