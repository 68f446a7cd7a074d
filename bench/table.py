"""``python -m bench.table ROWS``: the rows as a small table.

Times are minima: what else runs on a shared machine only ever adds to them.
"""

from __future__ import annotations

import argparse
from typing import cast

from tabulate import tabulate

from .rows import Row, by_case, read_rows

OURS = "ours pissa"
HEADERS = ("case", "provider", "min ms", f"× {OURS}", "energy deficit", "peak extra MiB")


def table(rows: list[Row], style: str) -> str:
    """Time, its ratio to ours, accuracy and memory, for each case and provider.

    Args:
        rows: as :func:`bench.rows.read_rows` gives them.
        style: a format of the tabulate package, "github" for Markdown.
    """
    lines = []
    for case, group in by_case(rows).items():
        ours = next((row["min_ms"] for row in group if row["provider"] == OURS), None)
        for place, row in enumerate(group):
            lines.append((case if place == 0 else "", row["provider"], *_figures(row, ours)))
    alignment = ("left", "left", "right", "right", "right", "right")
    return cast(str, tabulate(lines, HEADERS, tablefmt=style, disable_numparse=True, colalign=alignment))


def totals(rows: list[Row], style: str) -> str:
    """Times summed over the cases of each rank, for the providers that are green in all of them.

    Args:
        rows: as :func:`bench.rows.read_rows` gives them.
        style: a format of the tabulate package.
    """
    groups: dict[int, list[list[Row]]] = {}
    for group in by_case(rows).values():
        groups.setdefault(group[0]["rank"], []).append(group)
    lines = []
    for rank, cases in sorted(groups.items()):
        times = {
            name: [row["min_ms"] for case in cases for row in case if row["provider"] == name and row["ok"]]
            for name in dict.fromkeys(row["provider"] for case in cases for row in case)
        }
        worst = {
            name: max(row["energy_deficit"] for case in cases for row in case if row["provider"] == name)
            for name, values in times.items()
            if len(values) == len(cases)
        }
        ours = sum(times[OURS]) if OURS in worst else None
        for place, (name, deficit) in enumerate(worst.items()):
            label = f"{len(cases)} cases, rank {rank}" if place == 0 else ""
            total = sum(times[name])
            lines.append((label, name, _digits(total), f"{total / ours:.2f}" if ours else "–", f"{deficit:.1e}"))
    headers = ("sum over", "provider", "ms", f"× {OURS}", "worst energy deficit")
    alignment = ("left", "left", "right", "right", "right")
    return cast(str, tabulate(lines, headers, tablefmt=style, disable_numparse=True, colalign=alignment))


def _figures(row: Row, ours: float | None) -> tuple[str, str, str, str]:
    deficit, best, peak = row["energy_deficit"], row["min_ms"], row["peak_extra_mib"]
    shown = "–" if deficit is None else f"{deficit:.1e}"
    if not row["ok"]:
        return f"red: {row['reason']}", "–", shown, "–"
    ratio = f"{best / ours:.2f}" if ours else "–"
    return _digits(best), ratio, shown, "–" if peak is None else _digits(peak)


def _digits(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("rows", metavar="ROWS.jsonl")
    parser.add_argument("--format", default="simple", help="a tabulate format; github for Markdown")
    parser.add_argument("--totals", action="store_true", help="sums over the cases of each rank instead")
    arguments = parser.parse_args()
    show = totals if arguments.totals else table
    print(show(read_rows(arguments.rows), arguments.format))


if __name__ == "__main__":
    main()
