"""The table of checkpoints: times, memory and accuracy of each checkpoint and provider."""

from __future__ import annotations

from ..harness.rows import Row, by_case
from ..harness.table import OURS, formatted

HEADERS = (
    *("checkpoint", "provider", "wall s", f"× {OURS}", "imports s", "work s", "work CPU s", "sync s"),
    *("peak MiB", "limit MiB", "energy deficit", "rounding"),
)


def table(rows: list[Row], style: str = "simple") -> str:
    """Times, memory and accuracy of each provider on each checkpoint.

    Args:
        rows: rows of checkpoints.
        style: format of the tabulate package.
    """
    lines = []
    for case, group in by_case(rows).items():
        ours = next((row["wall_s"] for row in group if row["provider"] == OURS), None)
        for place, row in enumerate(group):
            label = f"{case}, {row['checkpoint_bytes'] / 1e9:.1f} GB" if place == 0 else ""
            lines.append((label, *_cells(row, ours)))
    return formatted(lines, HEADERS, style)


def _cells(row: Row, ours: float | None) -> tuple[str, ...]:
    def shown(key: str, form: str) -> str:
        return "–" if row[key] is None else format(row[key], form)

    return (
        row["provider"] if row["ok"] else f"{row['provider']}, red: {row['reason']}",
        shown("wall_s", ".1f"),
        f"{row['wall_s'] / ours:.2f}" if row["ok"] and ours else "–",
        *(shown(key, ".1f") for key in ("imports_s", "work_s", "work_cpu_s", "sync_s")),
        shown("peak_mib", ".0f"),
        shown("limit_mib", ".0f") if row["provider"] == OURS else "–",
        *(shown("energy_deficit", ".1e"), shown("rounding", ".3g")),
    )
