"""The table of stacks of experts."""

from __future__ import annotations

from ..harness.rows import Row, by_case
from ..harness.table import OURS, digits, formatted

HEADERS = ("case", "provider", "min ms", "ms an expert", f"× {OURS}", "worst energy deficit")


def table(rows: list[Row], style: str = "simple") -> str:
    """Time of each stack and of one of its experts, their ratio to ours, and the deficit of the worst expert.

    Args:
        rows: rows of stacks of experts.
        style: format of the tabulate package.
    """
    lines = []
    for case, group in by_case(rows).items():
        ours = next((row["ms_an_expert"] for row in group if row["provider"] == OURS), None)
        for place, row in enumerate(group):
            lines.append((case if place == 0 else "", *_cells(row, ours)))
    return formatted(lines, HEADERS, style)


def _cells(row: Row, ours: float | None) -> tuple[str, str, str, str, str]:
    deficit, time = row["worst_deficit"], row["ms_an_expert"]
    shown = "–" if deficit is None else f"{deficit:.1e}"
    if time is None:
        return f"{row['provider']}, red: {row['reason']}", "–", "–", "–", shown
    ratio = f"{time / ours:.2f}" if ours else "–"
    return row["provider"], digits(row["min_ms"]), f"{time:.2f}", ratio, shown
