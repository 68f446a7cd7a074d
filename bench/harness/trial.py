"""The steps of a measurement: gate → time → memory → row, for one provider on one case."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .rows import Row, fields_of
from .timing import Subject, Times, interleaved


@dataclass(kw_only=True)
class Trial:
    """One provider on one case. The steps fill it in.

    Attributes:
        subject: what is timed; None where the provider could not be prepared.
        first_seconds: duration of the first run.
        reason: why the provider is not timed; None if it passed the gate.
        times: None without timed runs.
        peak_extra_mib: peak memory in MiB; None where it was not measured.
    """

    subject: Subject | None = None
    first_seconds: float = 0.0
    reason: str | None = None
    times: Times | None = None
    peak_extra_mib: float | None = None

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Record an exception of the block as the reason: its type only, because its message may contain paths."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.reason = f"raised {type(error).__name__}"

    def time_fields(self) -> Row:
        """The times as fields of a row; without timed runs None, and 0 repeats."""
        return fields_of(Times, self.times) | ({} if self.times else {"repeats": 0})


def time_passed(trials: Mapping[str, Trial], repeats: int, device: str) -> None:
    """Time, in turn, the trials that passed the gate."""
    subjects = {name: trial.subject for name, trial in _passed(trials).items() if trial.subject is not None}
    times = interleaved(subjects, {name: trials[name].first_seconds for name in subjects}, repeats, device)
    for name, found in times.items():
        trials[name].times = found


def measure_memory(trials: Mapping[str, Trial], peak_extra_mib: Callable[[str], float | None]) -> None:
    """Measure the peak memory of the trials that passed the gate.

    A provider that fails in its fresh process loses its times.

    Args:
        trials: trials by provider.
        peak_extra_mib: measures the provider of this name in a fresh process; MiB.
    """
    for name, trial in _passed(trials).items():
        with _failing(trial):
            trial.peak_extra_mib = peak_extra_mib(name)


@contextlib.contextmanager
def _failing(trial: Trial) -> Iterator[None]:
    try:
        yield
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        trial.reason, trial.times = "failed in a fresh process", None


def _passed(trials: Mapping[str, Trial]) -> dict[str, Trial]:
    return {name: trial for name, trial in trials.items() if trial.reason is None}
