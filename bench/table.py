"""``python -m bench.table ROWS``: the rows as a small table."""

from __future__ import annotations

import argparse
from typing import cast

from tabulate import tabulate

from .rows import Row, by_case, read_rows

OURS = "ours pissa"
HEADERS = ("case", "provider", "median ms", f"× {OURS}", "energy deficit", "peak extra MiB")


def table(rows: list[Row], style: str) -> str:
    """Time, its ratio to ours, accuracy and memory, for each case and provider.

    Args:
        rows: as :func:`bench.rows.read_rows` gives them.
        style: a format of the tabulate package, "github" for Markdown.
    """
    lines = []
    for case, group in by_case(rows).items():
        ours = next((row["median_ms"] for row in group if row["provider"] == OURS), None)
        for place, row in enumerate(group):
            lines.append((case if place == 0 else "", row["provider"], *_figures(row, ours)))
    alignment = ("left", "left", "right", "right", "right", "right")
    return cast(str, tabulate(lines, HEADERS, tablefmt=style, disable_numparse=True, colalign=alignment))


def _figures(row: Row, ours: float | None) -> tuple[str, str, str, str]:
    deficit, median, peak = row["energy_deficit"], row["median_ms"], row["peak_extra_mib"]
    shown = "–" if deficit is None else f"{deficit:.1e}"
    if not row["ok"]:
        return f"red: {row['reason']}", "–", shown, "–"
    ratio = f"{median / ours:.2f}" if ours else "–"
    return _digits(median), ratio, shown, "–" if peak is None else _digits(peak)


def _digits(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("rows", metavar="ROWS.jsonl")
    parser.add_argument("--format", default="simple", help="a tabulate format; github for Markdown")
    arguments = parser.parse_args()
    print(table(read_rows(arguments.rows), arguments.format))


if __name__ == "__main__":
    main()
