"""Stacks of experts: gate → time → row, for each case and provider."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..harness import benchmark
from ..harness.benchmark import Benchmark, Settings
from ..harness.dtypes import DTYPES
from ..harness.gate import BASELINE_LIMIT, ROUNDING, above, reference, rounding_error, subspace_deficit
from ..harness.rows import Row, first_fields
from ..harness.timing import timed
from ..harness.trial import Trial, time_passed
from ..initializers.gate import SLACK
from ..initializers.providers import SCALING
from ..initializers.spectra import synthetic_weight
from ..initializers.suites import MINILM_LINEARS
from .providers import BASELINES, FULL_SVDS, OURS, PROVIDERS, Pair, Provider
from .table import table

# The tolerance of "pissa" on the energy deficit, for adapters in float32.
DEFICIT_LIMIT = 1e-6
# Full SVDs take a third of a second each, so a few experts must do.
FULL_SVD_EXPERTS = 2
LAYERS = 6


@dataclass(frozen=True)
class Case:
    """A stack of experts and the rank of their adapters.

    Attributes:
        experts: E, number of experts.
        shape: (out, in) of one expert.
        rank: r.
        dtype: dtype of the stack.
    """

    experts: int
    shape: tuple[int, int]
    rank: int
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"experts-{self.experts}x{self.shape[0]}x{self.shape[1]}-real-like-r{self.rank}-{self.dtype}"

    def stack(self) -> Tensor:
        """The weights (E, out, in)."""
        return torch.stack([expert(self.shape, self.dtype, index) for index in range(self.experts)])


@functools.lru_cache(maxsize=64)  # cases of one shape have experts in common
def expert(shape: tuple[int, int], dtype: str, index: int) -> Tensor:
    """Expert ``index``: its spectrum is that of one of MiniLM's weights, and no two have equal singular vectors."""
    linears = list(MINILM_LINEARS)
    source = f"encoder.layer.{index % LAYERS}.{linears[index // LAYERS % len(linears)]}.weight"
    return synthetic_weight(shape, "real-like", source=source, seed=index).to(DTYPES[dtype])


SHAPE = (2048, 768)
CASES = (*(Case(experts, SHAPE, 16) for experts in (8, 16, 32, 64)), Case(8, (1024, 2048), 32))


class Experts(Benchmark[Case]):
    """Fused experts: how long a stack takes, and how the time grows with the number of experts."""

    name = "experts"
    repeats: ClassVar[int] = 15
    providers = tuple(PROVIDERS)
    measures_memory = False

    def select(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[tuple[Case, list[str]]]:
        if arguments.device != "cpu":
            parser.error("stacks of experts are measured on a CPU")
        return [(case, list(arguments.providers or PROVIDERS)) for case in CASES]

    def measure(self, case: Case, providers: Sequence[str], settings: Settings) -> Iterator[Row]:
        """Gate all providers, time those that pass; one row each."""
        stack = case.stack()
        trials = gated(case, providers, stack, settings.device)
        time_passed(trials, settings.repeats, settings.device)
        for name in providers:
            yield make_row(case, settings.device, name, trials[name])

    def table(self, rows: list[Row]) -> str:
        return table(rows)


@dataclass
class Subject:
    """A provider on a stack.

    Attributes:
        provider: the provider.
        stack: (E, out, in), not modified.
        rank: r.
        residual: the stack after the latest run.
        pairs: A and B of each expert, of the latest run.
    """

    provider: Provider
    stack: Tensor
    rank: int
    residual: Tensor = field(init=False)
    pairs: list[Pair] = field(init=False)

    def restore(self) -> None:
        torch.manual_seed(0)  # PEFT draws its sketch from the global generator
        self.residual, self.pairs = self.stack.clone(), []

    def run(self) -> None:
        self.pairs = self.provider(self.residual, self.rank)


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one expert.

    Attributes:
        deficit: 1 − ‖W·V̂‖_F²/Σ_{i≤r}σᵢ², V̂ an orthonormal basis of the rows of A.
        rounding: :func:`bench.harness.gate.rounding_error`; at most 1 if the residual was rounded once.
    """

    deficit: float
    rounding: float


@dataclass(kw_only=True)
class StackTrial(Trial):
    """A provider on a stack, with the accuracy of each expert, and the number of experts that it is measured on."""

    accuracies: list[Accuracy] = field(default_factory=list)
    experts: int = 0


def gated(case: Case, providers: Sequence[str], stack: Tensor, device: str) -> dict[str, StackTrial]:
    """A trial for each provider and its baseline, run once and compared with float64 references."""
    names = dict.fromkeys(providers) | {BASELINES[name]: None for name in providers if name in BASELINES}
    trials = {name: StackTrial() for name in names}
    for name, trial in trials.items():
        with trial.attempt():
            part = stack[:FULL_SVD_EXPERTS] if name == FULL_SVDS else stack
            subject = Subject(PROVIDERS[name](), part, case.rank)
            trial.first_seconds, trial.experts = timed(subject, device), len(part)
            trial.accuracies = [
                accuracy(weight, residual, pair)
                for weight, residual, pair in zip(part, subject.residual, subject.pairs, strict=True)
            ]
            trial.subject = subject
    for name, trial in trials.items():
        if trial.accuracies:
            baseline = trials[BASELINES[name]].accuracies if name in BASELINES else None
            trial.reason = rejection(name, trial.accuracies, baseline)
    return {name: trials[name] for name in providers}


def accuracy(weight: Tensor, residual: Tensor, pair: Pair) -> Accuracy:
    """The accuracy of one expert (out, in)."""
    truth = reference(weight)
    return Accuracy(
        subspace_deficit(truth.weight, pair.lora_A, truth.optimum(len(pair.lora_A))),
        rounding_error(truth.weight, residual, pair.lora_B, pair.lora_A, SCALING),
    )


def rejection(name: str, accuracies: Sequence[Accuracy], baseline: Sequence[Accuracy] | None) -> str | None:
    """Why a provider may not be timed, or None.

    Args:
        name: name of the provider.
        accuracies: of each expert.
        baseline: of each expert by the provider that this one has to be as accurate as; None or empty without one.
    """
    if name in BASELINES and not baseline:
        return "PEFT failed, so that there is no baseline"
    limit = DEFICIT_LIMIT if name in (OURS, FULL_SVDS) else BASELINE_LIMIT
    limits = [max(found.deficit, 0.0) for found in baseline] if baseline else [limit] * len(accuracies)
    for index, (found, most) in enumerate(zip(accuracies, limits, strict=True)):
        if not found.deficit >= -SLACK:
            return f"expert {index} captures more energy than the optimum, or none that is known"
        reason = above("energy deficit", found.deficit, most + SLACK) or above(ROUNDING, found.rounding, 1.0)
        if reason is not None:
            return f"expert {index}: {reason}"
    return None


def make_row(case: Case, device: str, name: str, trial: StackTrial) -> Row:
    """One line of the results."""
    row = first_fields(case, device, name, trial.reason) | trial.time_fields()
    row["experts_timed"] = trial.experts
    row["ms_an_expert"] = trial.times.min_ms / trial.experts if trial.times else None
    deficits = [found.deficit for found in trial.accuracies]
    row["worst_deficit"] = max(deficits, default=None)
    row["worst_rounding"] = max((found.rounding for found in trial.accuracies), default=None)
    return row


def main(name: str, argv: Sequence[str]) -> int:
    return benchmark.run(Experts(), argv)
