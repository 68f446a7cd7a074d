"""The table of quantized residuals: times beside one ``pissa``, and what each method saves of the error."""

from __future__ import annotations

from ..harness.rows import Row, by_case
from ..harness.table import OURS, digits, formatted


def table(rows: list[Row], style: str = "simple") -> str:
    """Times and errors of each method on each case.

    Args:
        rows: rows of quantized residuals.
        style: format of the tabulate package.
    """
    most = max(len(row["saved"] or ()) for row in rows)
    saved = [f"saved {count}, %" for count in range(1, most + 1)]
    headers = ("case", "provider", "min ms", f"× {OURS}", "SVD ms", f"SVD × {OURS}", *saved, "nuclear, %")
    lines = []
    for case, group in by_case(rows).items():
        ours = next((row["min_ms"] for row in group if row["provider"] == OURS), None)
        for place, row in enumerate(group):
            name = row["provider"] if row["ok"] else f"{row['provider']}, red: {row['reason']}"
            times = [figure for key in ("min_ms", "svd_ms") for figure in _times(row[key], ours)]
            shares = [*(row["saved"] or ()), *[None] * most][:most]
            lines.append((case if place == 0 else "", name, *times, *map(_percent, [*shares, row["nuclear_saved"]])))
    return formatted(lines, headers, style)


def _times(figure: float | None, ours: float | None) -> tuple[str, str]:
    if figure is None:
        return "–", "–"
    return digits(figure), f"{figure / ours:.2f}" if ours else "–"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
