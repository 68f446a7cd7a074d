"""Rows on disk: one JSON object per line, one line per case and provider."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]


def first_fields(case: Any, device: str, provider: str, reason: str | None) -> Row:
    """The fields with which every row starts.

    Args:
        case: dataclass with a ``name``.
        device: "cpu" or "cuda".
        provider: name of the provider.
        reason: why the provider has no times; None if it passed the gate.
    """
    row: Row = {"case": case.name, **dataclasses.asdict(case), "device": device, "provider": provider}
    return row | {"ok": reason is None, "reason": reason}


def fields_of(record_type: Any, record: Any) -> Row:
    """The fields of a dataclass instance; where ``record`` is None, every field of ``record_type`` as None."""
    if record is None:
        return dict.fromkeys(field.name for field in dataclasses.fields(record_type))
    return dataclasses.asdict(record)


def write_row(file: TextIO, row: Row) -> None:
    """Append one row and flush it, so that an interrupted run keeps what it measured."""
    file.write(json.dumps(_finite(row), allow_nan=False, ensure_ascii=False) + "\n")
    file.flush()


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, in the order of its lines.

    Raises:
        ValueError: a line is not a row.
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
    """Rows grouped by case, in the order of the file; of a repeated case and provider only the last row remains."""
    grouped: dict[str, dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault(row["case"], {})[row["provider"]] = row
    return {case: list(group.values()) for case, group in grouped.items()}


def _finite(value: Any) -> Any:
    # JSON has no NaN: a figure that is not finite becomes null
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
