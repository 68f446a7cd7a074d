"""Rows on disk: one JSON object a line, one line for each case and provider."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]


def write_row(file: TextIO, row: Row) -> None:
    """Append one row and flush it, so that an interrupted run keeps what it measured."""
    file.write(json.dumps(_finite(row), allow_nan=False, ensure_ascii=False) + "\n")
    file.flush()


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, in its order.

    Raises:
        ValueError: a line that is not a row.
    """
    rows: list[Row] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict) or not {"case", "provider", "ok"} <= row.keys():
            raise ValueError(f"line {number} is not a benchmark row")
        rows.append(row)
    return rows


def by_case(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows grouped by case, both in the order of the file; of a repeated case and provider the last one counts."""
    grouped: dict[str, dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault(row["case"], {})[row["provider"]] = row
    return {case: list(group.values()) for case, group in grouped.items()}


def _finite(value: Any) -> Any:
    # JSON has no NaN: a figure that is not finite becomes null
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
