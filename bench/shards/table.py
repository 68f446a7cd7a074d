"""The table of weights in shards."""

from __future__ import annotations

from ..harness.rows import Row, by_case
from ..harness.table import digits, formatted
from .providers import OURS

HEADERS = (
    "case",
    "provider",
    "min ms",
    "× on shards",
    "MiB in collectives",
    "collectives",
    "peak MiB",
    "energy deficit",
)


def table(rows: list[Row], style: str = "simple") -> str:
    """Time, its ratio to that on the shards, traffic and memory of the process with the most, and energy deficit.

    Args:
        rows: rows of weights in shards.
        style: format of the tabulate package.
    """
    lines = []
    for case, group in by_case(rows).items():
        ours = next((row["min_ms"] for row in group if row["provider"] == OURS), None)
        for place, row in enumerate(group):
            lines.append((case if place == 0 else "", *_cells(row, ours)))
    return formatted(lines, HEADERS, style)


def _cells(row: Row, ours: float | None) -> tuple[str, ...]:
    deficit, best, peak = row["energy_deficit"], row["min_ms"], row["peak_extra_mib"]
    shown = "–" if deficit is None else f"{deficit:.1e}"
    if not row["ok"]:
        return f"{row['provider']}, red: {row['reason']}", "–", "–", "–", "–", "–", shown
    return (
        row["provider"],
        "–" if best is None else digits(best),
        f"{best / ours:.2f}" if best and ours else "–",
        f"{row['collective_bytes'] / 2**20:.1f}",
        str(row["collectives"]),
        "–" if peak is None else digits(peak),
        shown,
    )
