"""The table of kernels: time, rate, memory and error of each case and provider."""

from __future__ import annotations

from ..harness.rows import Row, by_case
from ..harness.table import formatted

HEADERS = ("case", "who", "min ms", "GB/s", "of copy", "peak extra MiB", "error / reference's")


def table(rows: list[Row], style: str = "simple") -> str:
    """Time, rate, memory and error of each case; a star marks the backend that is chosen by default.

    Args:
        rows: rows of kernels.
        style: format of the tabulate package.
    """
    lines = []
    for case, group in by_case(rows).items():
        for place, row in enumerate(group):
            name = f"{row['provider']} *" if row["chosen"] else row["provider"]
            error = "–" if row["error_ratio"] is None else f"{row['error_ratio']:.2f}"
            lines.append((case if place == 0 else "", name, *_figures(row), error))
    return formatted(lines, HEADERS, style)


def _figures(row: Row) -> tuple[str, str, str, str]:
    if not row["ok"]:
        return f"red: {row['reason']}", "", "", ""
    memory = "" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.1f}"
    return f"{row['min_ms']:.3g}", f"{row['gb_per_s']:.3g}", f"{row['of_copy']:.0%}", memory
