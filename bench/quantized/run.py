"""Quantized residuals: gate → time → row, for each case and method."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pissa_kernels.quantize.bnb import FourBit

from ..harness import benchmark
from ..harness.benchmark import Benchmark, Settings
from ..harness.dtypes import DTYPES
from ..harness.gate import PISSA_LIMIT, above, reference, subspace_deficit
from ..harness.rows import Row, first_fields
from ..harness.timing import Times, timed
from ..harness.trial import Trial, time_passed
from ..initializers.spectra import minilm_weight, synthetic_weight
from .providers import PROVIDERS, Outcome, Provider
from .table import table

# Difference from the error of the iteration with full SVDs, relative to it.
ERROR_LIMIT = 2e-3
# Difference of a reported error from the one that float64 gives.
REPORT_LIMIT = 1e-5
# Full SVDs that take longer in all are made once.
ONCE_SECONDS = 10.0
FULL_SVDS = "torch.linalg.svd"
# Widths up to which nuclear norms are measured.
NUCLEAR_WIDTH = 2048
LAYERS = range(6)


@dataclass(frozen=True)
class Case:
    """Weights, their format, and the rank of their adapters.

    Attributes:
        weights: name of a linear layer of all-MiniLM-L6-v2, of which all six are taken, or "" for a synthetic one.
        shape: (out, in) of one weight.
        rank: r.
        dtype: dtype of the weights.
        double: whether NF4's scales are quantized as well.
        iterations: number of iterations.
    """

    weights: str
    shape: tuple[int, int]
    rank: int
    dtype: str
    double: bool
    iterations: int = 5

    @property
    def name(self) -> str:
        weights = (
            f"minilm-{self.weights.split('.')[-1 if 'self' in self.weights else 0]}" if self.weights else "real-like"
        )
        return (
            f"{weights}-{self.shape[0]}x{self.shape[1]}-nf4{'-double' if self.double else ''}-r{self.rank}-{self.dtype}"
        )

    @property
    def scheme(self) -> FourBit:
        return FourBit("nf4", 64, self.double)

    def tensors(self) -> list[Tensor]:
        if not self.weights:
            source = "encoder.layer.2.attention.output.dense.weight"
            found = [synthetic_weight(self.shape, "real-like", source=source)]
        else:
            found = [minilm_weight(f"encoder.layer.{layer}.{self.weights}.weight") for layer in LAYERS]
        return [weight.to(DTYPES[self.dtype]).contiguous() for weight in found]


LARGE = Case("", (4096, 4096), 128, "bf16", double=True)
SMALL = [
    Case(weights, shape, rank, "fp32", double=False)
    for weights, shape in (("attention.self.query", (384, 384)), ("intermediate.dense", (1536, 384)))
    for rank in (16, 64)
]
METHODS = {
    LARGE: ["ours qpissa", "ours pissa", FULL_SVDS],
    **{case: list(PROVIDERS) for case in SMALL},
}


class Quantized(Benchmark[Case]):
    """Times on one large weight, errors on real ones."""

    name = "quantized"
    repeats = 5
    providers = tuple(PROVIDERS)
    measures_memory = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--width", type=int, default=LARGE.shape[0], metavar="N", help="of the large weight")

    def select(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[tuple[Case, list[str]]]:
        if arguments.device != "cpu":
            parser.error("the quantized formats are measured on a CPU")
        if arguments.width < 2 * LARGE.rank:
            parser.error(f"--width must be at least {2 * LARGE.rank}")
        large = Case("", (arguments.width, arguments.width), LARGE.rank, LARGE.dtype, LARGE.double)
        return [
            (large if case is LARGE else case, [name for name in arguments.providers or names if name in names])
            for case, names in METHODS.items()
        ]

    def measure(self, case: Case, providers: Sequence[str], settings: Settings) -> Iterator[Row]:
        """Gate all methods, time those that pass; one row each."""
        weights = case.tensors()
        plain = math.sqrt(sum(_square(PROVIDERS["qlora"](W, case.rank, case.scheme, 1).error(W)) for W in weights))
        trials = {name: MethodTrial() for name in providers}
        for name, trial in trials.items():
            print(f"  {name}", file=sys.stderr, flush=True)
            with trial.attempt():
                subject = Method(PROVIDERS[name], case, weights)
                trial.first_seconds = timed(subject, settings.device)
                if name == FULL_SVDS and trial.first_seconds > ONCE_SECONDS:
                    milliseconds = 1e3 * trial.first_seconds
                    trial.times = Times(milliseconds, milliseconds, milliseconds, milliseconds, 1)
                else:
                    trial.subject = subject
                trial.method, trial.accuracy = subject, accuracy(name, subject, plain, once=trial.times is not None)
        reject(trials, plain)
        once = {name: trial.times for name, trial in trials.items() if trial.times is not None}
        time_passed(
            {name: trial for name, trial in trials.items() if name not in once}, settings.repeats, settings.device
        )
        for name, trial in trials.items():
            if trial.reason is not None:
                trial.times = None
            yield make_row(case, settings.device, name, trial, plain)

    def table(self, rows: list[Row]) -> str:
        return table(rows)


@dataclass
class Method:
    """One method on all weights of a case.

    Attributes:
        provider: the method.
        case: the case.
        weights: its weights.
        outcomes: of the latest run.
        svd_seconds: time in SVDs in each run, where it is known.
    """

    provider: Provider
    case: Case
    weights: list[Tensor]
    outcomes: list[Outcome] = field(default_factory=list)
    svd_seconds: list[float] = field(default_factory=list)

    def restore(self) -> None:
        self.outcomes = []

    def run(self) -> None:
        self.outcomes = self.outcomes_after(self.case.iterations)
        seconds = [outcome.svd_seconds for outcome in self.outcomes]
        if None not in seconds:
            self.svd_seconds.append(sum(second for second in seconds if second is not None))

    def outcomes_after(self, iterations: int) -> list[Outcome]:
        case = self.case
        return [self.provider(weight, case.rank, case.scheme, iterations) for weight in self.weights]

    def error(self, outcomes: list[Outcome]) -> float:
        """‖W − W_q − B·A‖_F of all weights together."""
        return math.sqrt(
            sum(_square(outcome.error(weight)) for outcome, weight in zip(outcomes, self.weights, strict=True))
        )


@dataclass(frozen=True)
class Accuracy:
    """What a method loses.

    Attributes:
        errors: ‖W − W_q − B·A‖_F of all weights together after 1, 2, … iterations; None where it was not measured.
        nuclear_saved: share of the nuclear norms of W − Q(W) that is saved at the end.
        energy_deficit: for a method that does not quantize.
        misreported: largest difference of a reported error from float64's, relative to it.
    """

    errors: list[float | None]
    nuclear_saved: float | None = None
    energy_deficit: float | None = None
    misreported: float | None = None


@dataclass(kw_only=True)
class MethodTrial(Trial):
    """A method with its accuracy; None where it failed."""

    method: Method | None = None
    accuracy: Accuracy | None = None


def accuracy(name: str, method: Method, plain: float, once: bool) -> Accuracy:
    """What a method that has run loses; ``once`` if it is not to run again."""
    case, pairs = method.case, list(zip(method.outcomes, method.weights, strict=True))
    if method.outcomes[0].values is None:
        worst = 0.0
        for outcome, weight in pairs:
            truth = reference(weight)
            assert outcome.lora_A is not None
            worst = max(worst, subspace_deficit(truth.weight, outcome.lora_A, truth.optimum(case.rank)))
        return Accuracy([], energy_deficit=worst)
    last = method.error(method.outcomes)
    if name == "qlora":
        before: list[float | None] = []
    elif once:
        before = [None] * (case.iterations - 1)
    else:
        before = [method.error(method.outcomes_after(count)) for count in range(1, case.iterations)]
    nuclear = None
    if max(case.shape) <= NUCLEAR_WIDTH:
        lost = [
            (_nuclear(outcome.error(weight)), _nuclear(PROVIDERS["qlora"](weight, 1, case.scheme, 1).error(weight)))
            for outcome, weight in pairs
        ]
        nuclear = 1 - sum(with_it for with_it, _ in lost) / sum(without for _, without in lost)
    reports = [
        abs(outcome.reported / float(outcome.error(weight).norm()) - 1)
        for outcome, weight in pairs
        if outcome.reported is not None
    ]
    return Accuracy([*before, last], nuclear, misreported=max(reports, default=None))


def reject(trials: Mapping[str, MethodTrial], plain: float) -> None:
    """Set the reason of each method that may not be timed."""
    full = trials[FULL_SVDS].accuracy if FULL_SVDS in trials else None
    for name, trial in trials.items():
        found = trial.accuracy
        if found is None:
            continue
        if found.energy_deficit is not None:
            trial.reason = above("energy deficit of the rounded A", found.energy_deficit, PISSA_LIMIT)
            continue
        last = found.errors[-1]
        assert last is not None
        if name != "qlora":
            trial.reason = above("error relative to plain quantization's", last / plain, 1.0)
        if found.misreported is not None:
            trial.reason = trial.reason or above("difference of the reported error", found.misreported, REPORT_LIMIT)
        if name == "ours qpissa" and full is not None and full.errors[-1] is not None:
            difference = last / full.errors[-1] - 1
            trial.reason = trial.reason or above("error above that with full SVDs, relative,", difference, ERROR_LIMIT)


def make_row(case: Case, device: str, name: str, trial: MethodTrial, plain: float) -> Row:
    """One line of the results."""
    row = first_fields(case, device, name, trial.reason) | trial.time_fields()
    found, method = trial.accuracy, trial.method
    row["svd_ms"] = 1e3 * min(method.svd_seconds) if method and method.svd_seconds and not trial.reason else None
    row["errors"] = found.errors if found else None
    row["error_without"] = plain
    row["saved"] = [None if error is None else 1 - error / plain for error in found.errors] if found else None
    row["nuclear_saved"] = found.nuclear_saved if found else None
    row["energy_deficit"] = found.energy_deficit if found else None
    return row


def _square(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def _nuclear(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).sum())


def main(name: str, argv: Sequence[str]) -> int:
    return benchmark.run(Quantized(), argv)
