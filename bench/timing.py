"""Interleaved timing: what disturbs the machine disturbs every subject alike."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from .providers import Subject

# What takes longer than this is repeated at most SLOW_REPEATS times.
SLOW_SECONDS = 5.0
SLOW_REPEATS = 3


@dataclass(frozen=True)
class Times:
    """Milliseconds of a subject's runs."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    repeats: int


def timed(subject: Subject, device: str) -> float:
    """Seconds of one run, from a restored state to an idle device."""
    subject.restore()
    _finish(device)
    began = time.perf_counter()
    subject.run()
    _finish(device)
    return time.perf_counter() - began


def interleaved(subjects: dict[str, Subject], first: dict[str, float], repeats: int, device: str) -> dict[str, Times]:
    """Time subjects round-robin, after one warm-up each.

    Args:
        subjects: by name; each has run before.
        first: seconds of that earlier run. Slow is what was slow in it and in the warm-up: one of them may have met
            another process.
        repeats: rounds.
        device: "cpu" or "cuda".
    """
    slow = {name for name, subject in subjects.items() if min(timed(subject, device), first[name]) > SLOW_SECONDS}
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(repeats):
        for name, subject in subjects.items():
            if name not in slow or turn < SLOW_REPEATS:
                seconds[name].append(timed(subject, device))
    return {name: _summary(runs) for name, runs in seconds.items()}


def _summary(seconds: list[float]) -> Times:
    p20, median, p80 = (float(value) for value in np.percentile(seconds, (20, 50, 80)) * 1e3)
    return Times(median, p20, p80, min(seconds) * 1e3, len(seconds))


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
