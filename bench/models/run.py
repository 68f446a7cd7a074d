"""``get_peft_model`` on a Llama-shaped model: gate → time → memory → row.

Every weight has the spectrum of a real projection. The model is never run: the benchmark times the injection of an
adapter into all linear layers, as a user calls it, and checks the accuracy of each layer.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pissa_kernels.adapter.layers import lora_layers

from ..harness import benchmark, gate
from ..harness.benchmark import Benchmark, Settings
from ..harness.rows import Row, first_fields
from ..harness.timing import timed
from ..harness.trial import Trial, measure_memory, time_passed
from . import memory
from .injection import PROVIDERS, STANDARD, Injection
from .llama import Base, ModelCase, add_case_arguments, case_of, targets


class Model(Benchmark[ModelCase]):
    """A whole model."""

    name = "model"
    repeats = 3
    providers = tuple(PROVIDERS)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_case_arguments(parser)
        parser.add_argument("--sweep", action="store_true", help="also measure fewer layers and smaller widths")

    def select(
        self, parser: argparse.ArgumentParser, arguments: argparse.Namespace
    ) -> list[tuple[ModelCase, list[str]]]:
        whole = case_of(parser, arguments)
        providers = arguments.providers or list(STANDARD[arguments.device])
        if any("GPU" in name for name in providers) and not torch.cuda.is_available():
            parser.error("torch finds no CUDA device")
        return [(case, providers) for case in (sweep(whole) if arguments.sweep else [whole])]

    def measure(self, case: ModelCase, providers: Sequence[str], settings: Settings) -> list[Row]:
        """Gate all providers, time those that pass, measure their memory; one row each."""
        base = Base(case)
        trials = gated(base, providers, settings.device)
        time_passed(trials, settings.repeats, settings.device)
        if settings.memory and settings.device == "cpu":
            with memory.saved_weights(base) as weights:
                measure_memory(trials, lambda name: memory.peak_extra_mib(name, case, weights))
        return [make_row(case, settings.device, name, trial) for name, trial in trials.items()]


def sweep(whole: ModelCase) -> list[ModelCase]:
    """A model with fewer layers, with four layers of smaller widths, and whole."""
    fewer = [dataclasses.replace(whole, layers=layers) for layers in (1, 2, 4, 8) if layers < whole.layers]
    narrower = [
        dataclasses.replace(whole, layers=4, width=whole.width // part, inner=whole.inner // part)
        for part in (4, 2)
        if whole.width % (64 * whole.groups * part) == 0
    ]
    return [*narrower, *fewer, whole]


@dataclass(kw_only=True)
class ModelTrial(Trial):
    """A provider on a model.

    Attributes:
        energy_deficit: largest energy deficit of a layer; None for a provider without SVD.
        rounding: largest rounding error of a layer; None likewise.
    """

    energy_deficit: float | None = None
    rounding: float | None = None


def gated(base: Base, providers: Sequence[str], device: str) -> dict[str, ModelTrial]:
    """A trial for each provider, with its accuracy and, where it is outside the limits, the reason."""
    subjects = {name: Injection(base, name, device) for name in providers}
    trials = {
        name: ModelTrial(subject=subject, first_seconds=timed(subject, device)) for name, subject in subjects.items()
    }
    for name, subject in subjects.items():
        timed(subject, device)  # again, because all providers work on the same model
        if isinstance(subject.method.init, str):
            deficit, rounding = worst_deficit(base, device)
            trials[name].energy_deficit, trials[name].rounding = deficit, rounding
            trials[name].reason = gate.layer_rejection(name, deficit, rounding)
    return trials


def worst_deficit(base: Base, device: str) -> tuple[float, float]:
    """Over all layers, the largest energy deficit of the rows of A as stored, and the largest rounding error.

    The rounding error is that of :func:`bench.harness.gate.rounding_error`.
    """
    figures = []
    for name, layer in lora_layers(base.adapted):
        truth = gate.reference(base.pristine[name].to(device))
        A, B = (factor["default"].weight.detach().to(device) for factor in (layer.lora_A, layer.lora_B))
        residual = layer.get_base_layer().weight.detach().to(device)
        deficit = gate.subspace_deficit(truth.weight, A, truth.optimum(len(A)))
        figures.append((deficit, gate.rounding_error(truth.weight, residual, B, A, layer.scaling["default"])))
    largest_deficit, largest_error = np.max(figures, axis=0)  # propagates NaN, which Python's max may drop
    return float(largest_deficit), float(largest_error)


def make_row(case: ModelCase, device: str, provider: str, trial: ModelTrial) -> Row:
    """One line of the results."""
    adapter = sum(case.rank * sum(module.weight.shape) * 4 for _, module in targets(case.empty()))
    row = first_fields(case, device, provider, trial.reason) | trial.time_fields()
    return row | {
        "peak_extra_mib": trial.peak_extra_mib,
        "adapter_mib": adapter / 2**20,
        "energy_deficit": trial.energy_deficit,
        "rounding": trial.rounding,
    }


def main(name: str, argv: Sequence[str]) -> int:
    return benchmark.run(Model(), argv)
