"""Interleaved timing: another load on the machine slows down all subjects alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

# A subject slower than this is timed at most SLOW_REPEATS times.
SLOW_SECONDS = 5.0
SLOW_REPEATS = 3


class Subject(Protocol):
    """Work that can be repeated on one input."""

    def restore(self) -> None:
        """Undo what a run has changed; not timed."""

    def run(self) -> None:
        """The timed part."""


@dataclass(frozen=True)
class Times:
    """Times of a subject's runs.

    Attributes:
        median_ms, p20_ms, p80_ms, min_ms: median, 20th and 80th percentile, and minimum, in milliseconds.
        repeats: number of runs.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    repeats: int


def timed(subject: Subject, device: str) -> float:
    """Seconds of one run, from a restored state to an idle device."""
    subject.restore()
    _synchronize(device)
    began = time.perf_counter()
    subject.run()
    _synchronize(device)
    return time.perf_counter() - began


def interleaved(
    subjects: Mapping[str, Subject], first: Mapping[str, float], repeats: int, device: str
) -> dict[str, Times]:
    """Time subjects round-robin, after one warm-up run each.

    Args:
        subjects: subjects by name; each has run before.
        first: seconds of that earlier run. A subject is slow if both this run and the warm-up were: another process
            may have slowed down one of them.
        repeats: number of rounds.
        device: "cpu" or "cuda".
    """
    slow = {name for name, subject in subjects.items() if min(timed(subject, device), first[name]) > SLOW_SECONDS}
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(repeats):
        for name, subject in subjects.items():
            if name not in slow or turn < SLOW_REPEATS:
                seconds[name].append(timed(subject, device))
    return {name: summary(runs) for name, runs in seconds.items()}


def summary(seconds: list[float]) -> Times:
    """The times of some runs, from their seconds."""
    p20, median, p80 = (float(value) for value in np.percentile(seconds, (20, 50, 80)) * 1e3)
    return Times(median, p20, p80, min(seconds) * 1e3, len(seconds))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
