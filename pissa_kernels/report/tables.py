"""Plain text tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns as wide as their widest cell, two blanks apart, dashes under the heads; no trailing blanks.

    Args:
        heads: one for each column.
        rows: cells as text, as many in a row as there are heads.
        left: indices of the columns that are aligned to the left; all others are to the right.
    """
    widths = [max(len(row[index]) for row in (heads, *rows)) for index in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
