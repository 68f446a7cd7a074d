"""Initializers of single layers: gate → time → memory → row, for each case and provider of a suite."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..harness import benchmark
from ..harness.benchmark import Benchmark, Settings
from ..harness.gate import reference
from ..harness.rows import Row, fields_of, first_fields
from ..harness.timing import timed
from ..harness.trial import Trial, measure_memory, time_passed
from . import gate, memory
from .cases import Case
from .gate import Accuracy
from .providers import PROVIDERS, Provider
from .suites import SUITES


class Initializers(Benchmark[Case]):
    """One suite of cases."""

    providers = tuple(PROVIDERS)

    def __init__(self, suite: str) -> None:
        self.name = suite

    def select(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[tuple[Case, list[str]]]:
        suite = SUITES[self.name]
        return [(case, arguments.providers or list(suite.providers)) for case in suite.cases]

    def measure(self, case: Case, providers: Sequence[str], settings: Settings) -> list[Row]:
        """Gate all providers, time those that pass, measure their memory; one row each."""
        weight = case.weight(settings.device)
        trials = gated(case, providers, weight, settings.device)
        time_passed(trials, settings.repeats, settings.device)
        if settings.memory:
            measure_memory(
                trials, lambda name: memory.peak_extra_mib(PROVIDERS[name], weight, case.rank, case.fan_in_fan_out)
            )
        return [make_row(case, settings.device, trial) for trial in trials.values()]


@dataclass(kw_only=True)
class InitializerTrial(Trial):
    """A provider on a weight, with its accuracy; None where the provider failed."""

    provider: Provider
    accuracy: Accuracy | None = None


def gated(case: Case, providers: Sequence[str], weight: Tensor, device: str) -> dict[str, InitializerTrial]:
    """A trial for each provider, run once and compared with the float64 reference."""
    view = weight.mT if case.fan_in_fan_out else weight
    truth = reference(view)
    trials = {name: InitializerTrial(provider=PROVIDERS[name]) for name in providers}
    for name in providers:
        # our "pissa_niter_N" is compared with PEFT's, whether or not PEFT's gets a row
        if trials[name].provider.family == "ours" and trials[name].provider.niter is not None:
            baseline = f"peft {trials[name].provider.init}"
            trials.setdefault(baseline, InitializerTrial(provider=PROVIDERS[baseline]))
    for trial in trials.values():
        with trial.attempt():
            subject = trial.provider.prepare(weight, case.rank, case.fan_in_fan_out)
            trial.first_seconds = timed(subject, device)
            trial.accuracy = gate.measure(trial.provider, subject.outcome(), view, case.rank, truth)
            trial.subject = subject
    for trial in trials.values():
        if trial.accuracy is not None:
            against = trials.get(f"peft {trial.provider.init}")
            baseline_accuracy = against.accuracy if against is not None else None
            trial.reason = gate.rejection(trial.provider, trial.accuracy, weight.dtype, baseline_accuracy)
    return {name: trials[name] for name in providers}


def make_row(case: Case, device: str, trial: InitializerTrial) -> Row:
    """One line of the results."""
    row = first_fields(case, device, trial.provider.name, trial.reason)
    row |= trial.time_fields()
    row["peak_extra_mib"] = trial.peak_extra_mib
    return row | fields_of(Accuracy, trial.accuracy)


def main(name: str, argv: Sequence[str]) -> int:
    return benchmark.run(Initializers(name), argv)
