"""Plain text tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table whose columns fit their widest cell, with two spaces between columns and dashes under the heads.

    Args:
        heads: head of each column.
        rows: cells as text, one for each head.
        left: indices of the columns to align left; the others are aligned right.
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
