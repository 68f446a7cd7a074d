"""The table of initializers and models: time, accuracy and memory of each case and provider.

Times are minima, because other processes on a shared machine only ever add to a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tabulate import tabulate

from .rows import Row, by_case

OURS = "ours pissa"
HEADERS = ("case", "provider", "min ms", f"× {OURS}", "energy deficit", "peak extra MiB")


def table(rows: list[Row], style: str = "simple") -> str:
    """Time, its ratio to ours, accuracy and memory of each case and provider.

    Args:
        rows: rows of initializers or models.
        style: format of the tabulate package, "github" for Markdown.
    """
    lines = []
    for case, group in by_case(rows).items():
        ours = next((row["min_ms"] for row in group if row["provider"] == OURS), None)
        for place, row in enumerate(group):
            lines.append((case if place == 0 else "", row["provider"], *_figures(row, ours)))
    return formatted(lines, HEADERS, style)


def formatted(lines: Sequence[tuple[str, ...]], headers: Sequence[str], style: str) -> str:
    """Lines of text under headers: the first two columns aligned to the left, figures to the right."""
    alignment = ("left", "left", *["right"] * (len(headers) - 2))
    return cast(str, tabulate(lines, headers, tablefmt=style, disable_numparse=True, colalign=alignment))


def digits(figure: float) -> str:
    """A figure with one decimal below 100 and none above."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.1f}"


def _figures(row: Row, ours: float | None) -> tuple[str, str, str, str]:
    deficit, best, peak = row["energy_deficit"], row["min_ms"], row["peak_extra_mib"]
    shown = "–" if deficit is None else f"{deficit:.1e}"
    if not row["ok"]:
        return f"red: {row['reason']}", "–", shown, "–"
    ratio = f"{best / ours:.2f}" if ours else "–"
    return digits(best), ratio, shown, "–" if peak is None else digits(peak)
