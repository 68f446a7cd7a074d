"""Plot accuracy against time, with one panel per case and one curve per family of providers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .. import commands
from ..harness.rows import Row, by_case, read_rows

# Colors of the families, from Okabe and Ito's palette, which is safe for color-blind readers. Markers are methods.
COLORS = {"ours": "#0072B2", "peft": "#D55E00"}
OTHER_COLOR = "#7F7F7F"
MARKERS = {"pissa": "*", "pissa_niter_1": "o", "pissa_niter_4": "^", "pissa_niter_16": "s"}
OTHER_MARKER = "v"
# Smaller deficits are drawn here: PEFT's full SVD has 1e-12, or a negative rounding error.
FLOOR = 1e-9
# Default tolerance of pissa_kernels.truncated_svd; that of "pissa" is at least 2.5e-6 for bfloat16 weights.
TOLERANCE = 1e-6
COLUMNS = 4
LEGEND_INCHES = 0.9


def plot(rows: list[Row], path: str | Path) -> None:
    """Energy deficit against the shortest time, both logarithmic; whiskers end at the 80th percentile.

    Args:
        rows: rows of initializers; those without times are not drawn.
        path: image file; its suffix is the format.

    Raises:
        ValueError: no row has a time, or the rows are not those of initializers.
    """
    if not all({"spectrum", "energy_deficit"} <= row.keys() for row in rows):
        raise ValueError("only rows of initializers can be plotted")
    timed = [row for row in rows if row["ok"] and row["min_ms"] is not None]
    cases = by_case(timed)
    if not cases:
        raise ValueError("no row has a time to plot")
    columns = min(COLUMNS, len(cases))
    lines = math.ceil(len(cases) / columns)
    width, height = max(7.0, 3.3 * columns + 0.8), 2.9 * lines + LEGEND_INCHES
    figure, panels = plt.subplots(lines, columns, figsize=(width, height), sharey=True, squeeze=False)
    legend: dict[str, Any] = {}
    lowest = min(max(row["energy_deficit"], FLOOR) for row in timed)
    for panel, group in zip(panels.flat, cases.values(), strict=False):
        for family in COLORS:
            _join(panel, family, group)
        for row in group:
            legend.setdefault(row["provider"], _draw(panel, row))
        _dress(panel, group, lowest)
    for empty in panels.flat[len(cases) :]:
        empty.set_visible(False)
    for line in panels:
        line[0].set_ylabel("energy deficit", fontsize=9)
    figure.tight_layout(rect=(0, LEGEND_INCHES / height, 1, 1), h_pad=1.5)
    _place_legend(figure, legend)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _place_legend(figure: Any, handles: dict[str, Any]) -> None:
    """One column per family, sorted by number of rounds."""
    families: dict[str, list[str]] = {}
    for name in sorted(handles, key=lambda name: (len(name), name)):
        families.setdefault(name.split()[0], []).append(name)
    longest = max(len(names) for names in families.values())
    blank = (Line2D([], [], linestyle=""), "")
    entries: list[tuple[Any, str]] = []
    for _, names in sorted(families.items()):
        entries += [(handles[name], name) for name in names] + [blank] * (longest - len(names))
    labels = [label for _, label in entries]
    figure.legend(
        [handle for handle, _ in entries], labels, loc="lower center", ncols=len(families), frameon=False, fontsize=9
    )


def _join(panel: Any, family: str, group: list[Row]) -> None:
    """The curve of one family over its numbers of rounds."""
    points = {
        int(row["provider"].rpartition("_")[2]): (row["min_ms"], max(row["energy_deficit"], FLOOR))
        for row in group
        if row["provider"].startswith(f"{family} pissa_niter_")
    }
    if len(points) > 1:
        times, deficits = zip(*(points[rounds] for rounds in sorted(points)), strict=True)
        panel.plot(times, deficits, color=COLORS[family], linewidth=1.0, alpha=0.6, zorder=1)


def _draw(panel: Any, row: Row) -> Any:
    family, _, method = row["provider"].partition(" ")
    shortest, deficit = row["min_ms"], max(row["energy_deficit"], FLOOR)
    color, exact = COLORS.get(family, OTHER_COLOR), method == "pissa"
    panel.plot([shortest, row["p80_ms"]], [deficit, deficit], color=color, linewidth=1.2, alpha=0.5, zorder=2)
    # hollow, so that overlapping markers stay visible
    return panel.scatter(
        [shortest],
        [deficit],
        s=130 if exact else 45,
        marker=MARKERS.get(method, OTHER_MARKER),
        facecolors=color if exact else "none",
        edgecolors=color,
        linewidths=0.5 if exact else 1.5,
        zorder=3,
    )


def _dress(panel: Any, group: list[Row], lowest: float) -> None:
    first = group[0]
    layout = " Conv1D" if first["fan_in_fan_out"] else ""
    shape = "×".join(str(size) for size in first["shape"])
    panel.set_title(
        f"{first['model']}\n{shape}{layout}, {first['dtype']}, {first['spectrum']}, rank {first['rank']}", fontsize=9
    )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(lowest / 4, 1)
    left, right = min(row["min_ms"] for row in group) / 1.7, max(row["p80_ms"] for row in group) * 1.7
    panel.set_xlim(left, right)
    panel.axhline(TOLERANCE, color="0.5", linewidth=1.0, linestyle=(0, (5, 3)), zorder=2)
    panel.text(right, TOLERANCE * 1.3, "tolerance ", ha="right", va="bottom", fontsize=7, color="0.45")
    panel.xaxis.set_major_locator(LogLocator(base=10, subs=(1,) if right > 60 * left else (1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(_milliseconds))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_locator(LogLocator(base=10, numticks=12))
    panel.yaxis.set_major_formatter(FuncFormatter(_power))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(True, which="major", color="0.92", zorder=0)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("shortest time", fontsize=9)


def _milliseconds(value: float, _: int) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def _power(value: float, _: int) -> str:
    exponent = round(math.log10(value))
    below = r"\leq " if value <= FLOOR * 1.01 else ""
    return f"${below}10^{{{exponent}}}$"


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, "One panel per case, one curve per family of providers.")
    parser.add_argument("rows", metavar="ROWS.jsonl", help="file of rows of initializers")
    parser.add_argument("image", metavar="IMAGE", help="image file; its suffix is the format, such as .png")
    arguments = parser.parse_args(argv)
    try:
        plot(read_rows(arguments.rows), arguments.image)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0
