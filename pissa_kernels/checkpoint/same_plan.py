"""Whether a run has the plan of an unfinished one, which it can resume only then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_same_plan(began: dict[str, Any], now: dict[str, Any], folder: Path, source: Path) -> None:
    """Check that two plans agree.

    Args:
        began, now: record of the unfinished run's plan, and of the plan of this run.
        folder: folder of the unfinished run.
        source: folder of the checkpoint.

    Raises:
        ValueError: they differ, or the source has changed; the message names the first difference.
    """
    for key, value in now.items():
        if (before := began.get(key)) == value:
            continue
        if key == "fingerprint":
            changed = sorted(_differing(before, value))
            raise ValueError(
                f"{source} has changed since the run in {folder} was started "
                f"({', '.join(changed[:3])}); --force starts again"
            )
        if isinstance(before, dict) and isinstance(value, dict):
            names = _differing(before, value)
            before, value = ({name: record.get(name) for name in sorted(names)} for record in (before, value))
        raise ValueError(
            f"the run in {folder} was started with {key} {_short(before)}, not {_short(value)}; --force starts again"
        )


def _differing(before: Any, now: dict[str, Any]) -> set[str]:
    """Keys whose values differ."""
    return {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:99] + "…"
