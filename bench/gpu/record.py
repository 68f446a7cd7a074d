"""What a run measures on, and the rows that its steps write."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..harness import environment
from ..harness.rows import Row, write_row
from ..models.llama import ModelCase
from .log import scrubbed

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Settings:
    """The options of a run.

    Attributes:
        out: folder for rows, log and profiles.
        device: "cuda" or "cpu".
        layers: decoder layers of the model.
        width: hidden size.
        inner: intermediate size.
        ranks: ranks of the adapters.
        ends: ``time.time()`` after which no step begins.
    """

    out: str
    device: str = "cuda"
    layers: int = 32
    width: int = 4096
    inner: int = 11008
    ranks: tuple[int, ...] = (128, 16)
    ends: float = float("inf")

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def left(self) -> float:
        """Seconds before the end of the budget; negative after it."""
        return self.ends - time.time()

    def model(self, layers: int, rank: int) -> ModelCase:
        """The model with its first ``layers`` layers at most."""
        return ModelCase(min(layers, self.layers), self.width, self.inner, groups=1, rank=rank)


class Recorder:
    """Writes the rows of one step to a file, and prints them.

    Attributes:
        step: name of the step.
        settings: options of the run.
        ok: whether all rows so far are.
    """

    def __init__(self, step: str, settings: Settings) -> None:
        self.step = step
        self.settings = settings
        self.ok = True

    def row(self, case: str, provider: str, *, reason: str | None = None, **figures: Any) -> None:
        """Write one row.

        Args:
            case: what was measured.
            provider: what measured it.
            reason: why the row is red; None if it is not.
            figures: the other fields.
        """
        reason = reason and scrubbed(reason)
        self.ok &= reason is None
        row: Row = {"step": self.step, "case": case, "device": self.settings.device, "provider": provider}
        row |= {"ok": reason is None, "reason": reason} | figures
        with (self.settings.folder / ROWS).open("a", encoding="utf-8") as file:
            write_row(file, row | _about(self.settings.device))
        print(line(row), flush=True)


def line(row: Row) -> str:
    """A row on one line: verdict, case, provider, figures."""
    fixed = {"step", "case", "device", "provider", "ok", "reason", "machine", "versions", "commit", "date"}
    figures = " ".join(f"{key}={_short(value)}" for key, value in row.items() if key not in fixed and value is not None)
    verdict = "  ok" if row["ok"] else " RED"
    return f"{verdict}  {row['case']:42} {row['provider']:20} {'' if row['ok'] else row['reason'] + '  '}{figures}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


@functools.cache
def _about(device: str) -> Row:
    return environment.about(device)
