"""Print rows as tables, one for each kind of row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .. import commands
from ..checkpoints.table import table as checkpoint_table
from ..experts.table import table as expert_table
from ..harness.rows import Row, by_case, read_rows
from ..harness.table import OURS, digits, formatted
from ..harness.table import table as initializer_table
from ..kernels.table import table as kernel_table
from ..quantized.table import table as quantized_table
from ..shards.table import table as shards_table

# A table, and the fields that distinguish its rows; the first match counts.
TABLES: tuple[tuple[set[str], Callable[[list[Row], str], str]], ...] = (
    ({"verb"}, kernel_table),
    ({"wall_s"}, checkpoint_table),
    ({"svd_ms"}, quantized_table),
    ({"ms_an_expert"}, expert_table),
    ({"collectives"}, shards_table),
    ({"min_ms", "energy_deficit"}, initializer_table),
)


def tables(rows: list[Row], style: str = "simple") -> str:
    """The tables of rows, in the order in which the first row of each kind appears.

    Args:
        rows: rows of one or more benchmarks.
        style: format of the tabulate package.

    Raises:
        ValueError: a row is of no known kind.
    """
    groups: dict[Callable[[list[Row], str], str], list[Row]] = {}
    for row in rows:
        groups.setdefault(_table_of(row), []).append(row)
    return "\n\n".join(table(group, style) for table, group in groups.items())


def totals(rows: list[Row], style: str = "simple") -> str:
    """Times summed over the cases of each rank, for the providers that passed all of them.

    Args:
        rows: rows of initializers or models.
        style: format of the tabulate package.

    Raises:
        ValueError: rows of another kind.
    """
    if any(_table_of(row) is not initializer_table for row in rows):
        raise ValueError("totals are those of initializers and models; these are other rows")
    groups: dict[int, list[list[Row]]] = {}
    for group in by_case(rows).values():
        groups.setdefault(group[0]["rank"], []).append(group)
    lines = []
    for rank, cases in sorted(groups.items()):
        for place, (name, cells) in enumerate(_sums(cases).items()):
            lines.append((f"{len(cases)} cases, rank {rank}" if place == 0 else "", name, *cells))
    return formatted(lines, ("sum over", "provider", "ms", f"× {OURS}", "worst energy deficit"), style)


def _table_of(row: Row) -> Callable[[list[Row], str], str]:
    for fields, table in TABLES:
        if fields <= row.keys():
            return table
    raise ValueError(f"the row of {row['case']!r} is of no known kind")


def _sums(cases: list[list[Row]]) -> dict[str, tuple[str, str, str]]:
    """Time, its ratio to ours, and the largest deficit of each provider that passed all cases."""
    passed: dict[str, list[Row]] = {}
    for row in (row for case in cases for row in case):
        passed.setdefault(row["provider"], []).extend([row] if row["ok"] else [])
    whole = {name: rows for name, rows in passed.items() if len(rows) == len(cases)}
    times = {name: sum(row["min_ms"] for row in rows) for name, rows in whole.items()}
    cells = {}
    for name, rows in whole.items():
        ratio = f"{times[name] / times[OURS]:.2f}" if OURS in times else "–"
        deficits = [row["energy_deficit"] for row in rows if row["energy_deficit"] is not None]
        cells[name] = digits(times[name]), ratio, f"{max(deficits):.1e}" if deficits else "–"
    return cells


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, "Times are minima.")
    parser.add_argument("rows", metavar="ROWS.jsonl", help="file of rows, of any benchmark")
    parser.add_argument("--format", default="simple", help="format of the tabulate package; github for Markdown")
    parser.add_argument("--totals", action="store_true", help="print sums over the cases of each rank")
    arguments = parser.parse_args(argv)
    show = totals if arguments.totals else tables
    try:
        print(show(read_rows(arguments.rows), arguments.format))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0
