"""The verbs of :mod:`pissa_kernels.ops`: time, bytes per second, and the share of the device's copy rate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from pissa_kernels import ops

from ..harness import benchmark
from ..harness.benchmark import Benchmark, Settings
from ..harness.rows import Row, first_fields
from ..harness.timing import timed
from ..harness.trial import Trial, measure_memory, time_passed
from . import memory
from .cases import CASES, Call, VerbCase
from .gate import VerbTrial, check_all
from .table import table

# Bytes of one buffer of the copy that sets the rate to compare with: larger than every cache.
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# On a GPU a run is many launches, on several weights in turn that together exceed its cache.
LAUNCHES, ROTATION_BYTES = 20, 256 << 20
COPY = "copy"


class Kernels(Benchmark[VerbCase]):
    """Every verb on weights of several shapes and dtypes."""

    name = "kernels"

    def select(
        self, parser: argparse.ArgumentParser, arguments: argparse.Namespace
    ) -> list[tuple[VerbCase, list[str]]]:
        return [(case, case.providers(arguments.device)) for case in CASES]

    def measure(self, case: VerbCase, providers: Sequence[str], settings: Settings) -> list[Row]:
        """Gate the providers, time those that pass beside a copy, measure their memory; one row each."""
        device = settings.device
        weight, left, right = case.inputs(device)
        calls = case.calls(weight, left, right)
        trials = {name: VerbTrial(call=calls[name]) for name in providers}
        check_all(case, trials, calls["ours torch"], weight, case.exact(weight, left, right))
        inplace = case.verb == "subtract_lowrank_"
        for trial in trials.values():
            if trial.reason is None:
                trial.subject = VerbSubject(trial.call, weight, inplace)
        copy = Trial(subject=copy_subject(device))
        with_copy = {**trials, COPY: copy}
        for each in with_copy.values():
            if each.subject is not None:
                each.first_seconds = timed(each.subject, device)
        time_passed(with_copy, settings.repeats, device)
        assert copy.times is not None
        copy_rate = 2 * COPY_BYTES[device] / copy.times.min_ms / 1e6
        if settings.memory:
            measured = {name: trial for name, trial in trials.items() if memory.is_measured(case, name, device)}
            measure_memory(measured, lambda name: memory.peak_extra_mib(name.removeprefix("ours "), case))
        chosen = f"ours {ops.backend(case.verb, weight)}"
        return [make_row(case, device, name, trial, copy_rate, name == chosen) for name, trial in trials.items()]

    def table(self, rows: list[Row]) -> str:
        return table(rows)


class VerbSubject:
    """A call on one weight, or on several in turn. In-place calls work on copies, which ``restore`` makes.

    Args:
        call: call to time.
        weight: weight that is copied.
        inplace: whether the call modifies the weight.
    """

    def __init__(self, call: Call, weight: Tensor, inplace: bool) -> None:
        self.call = call
        self.weight = weight
        self.inplace = inplace
        self.launches = LAUNCHES if weight.is_cuda else 1
        size = weight.numel() * weight.element_size()
        self.copies = min(self.launches, ROTATION_BYTES // max(1, size) + 1) if weight.is_cuda else 1
        self.restore()

    def restore(self) -> None:
        if self.inplace or not hasattr(self, "weights"):
            self.weights = [self.weight.clone() for _ in range(self.copies)]

    def run(self) -> None:
        for index in range(self.launches):
            self.call(self.weights[index % self.copies])


def copy_subject(device: str) -> VerbSubject:
    """A copy between two buffers, whose rate is the device's copy rate."""
    source = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    subject = VerbSubject(lambda _: target.copy_(source), source[:1], inplace=False)
    subject.launches = 1
    return subject


def make_row(case: VerbCase, device: str, name: str, trial: VerbTrial, copy_rate: float, chosen: bool) -> Row:
    """One line of the results; times and rates are those of one launch."""
    row = first_fields(case, device, name, trial.reason) | {"error_ratio": trial.error}
    row |= {"chosen": chosen, "bytes": case.bytes, "copy_gb_per_s": copy_rate}
    row |= dict.fromkeys(("median_ms", "min_ms", "gb_per_s", "of_copy")) | {"peak_extra_mib": trial.peak_extra_mib}
    if trial.times is not None:
        assert isinstance(trial.subject, VerbSubject)
        shortest = trial.times.min_ms / trial.subject.launches
        rate = case.bytes / shortest / 1e6
        row |= {"median_ms": trial.times.median_ms / trial.subject.launches, "min_ms": shortest}
        row |= {"gb_per_s": rate, "of_copy": rate / copy_rate}
    return row


def main(name: str, argv: Sequence[str]) -> int:
    return benchmark.run(Kernels(), argv)
