"""A model that is on the GPU: ``get_peft_model`` with this package, beside PEFT's own initializers.

PEFT's run on a few layers, and their time is scaled to all. Nothing is timed before its accuracy has been compared with
float64: :class:`.model.Accuracy`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..harness.dtypes import DTYPES
from ..harness.gate import BASELINE_LIMIT, above
from ..harness.rows import Row, fields_of
from ..harness.timing import interleaved, timed
from ..harness.trial import Trial
from ..models.injection import OURS, Injection, Method
from ..models.llama import targets
from .model import Accuracy, DeviceModel, accuracy
from .record import Recorder

# Layers on which PEFT's initializers run.
FEW = 2
NITER, PEFT_NITER, PLAIN = "ours pissa_niter_4", "peft pissa_niter_4", "peft plain LoRA"
# The method of the engine that decides nothing on the host; weights with another one fell back.
FIXED = "fixed"
REPEATS, SECONDS_OF_REPEATS = {"cuda": 5, "cpu": 1}, 12.0


@dataclass(kw_only=True)
class ModelTrial(Trial):
    """A provider on a model.

    Attributes:
        subject: what is timed.
        accuracy: None for a provider without SVD.
        peak_bytes: peak of the device's memory during the first run, beyond what was allocated before.
    """

    subject: Injection
    accuracy: Accuracy | None = None
    peak_bytes: int | None = None


def resident(recorder: Recorder) -> None:
    settings = recorder.settings
    few = DeviceModel(settings.model(FEW, 1), settings.device, settings.device)
    whole = DeviceModel(settings.model(settings.layers, 1), settings.device, settings.device)
    for rank in settings.ranks:
        for base in (few, whole):
            base.case = dataclasses.replace(base.case, rank=rank)
        measure(few, (OURS, NITER, PEFT_NITER), recorder)
        measure(whole, (OURS, PLAIN), recorder)
    full_svd(recorder)


def measure(base: DeviceModel, providers: Sequence[str], recorder: Recorder) -> None:
    """Gate providers on a model, time those that pass, write their rows."""
    device = recorder.settings.device
    trials = {name: gated(base, name, device) for name in providers}
    if NITER in trials:
        trials[NITER].reason = trials[NITER].reason or niter_rejection(trials)
    passed = {name: trial for name, trial in trials.items() if trial.reason is None}
    # slow providers have fewer runs
    slowest = max((trial.first_seconds for trial in passed.values()), default=1.0)
    repeats = max(1, min(REPEATS[device], int(SECONDS_OF_REPEATS / max(slowest, 1e-3))))
    subjects = {name: trial.subject for name, trial in passed.items()}
    times = interleaved(subjects, {name: trial.first_seconds for name, trial in passed.items()}, repeats, device)
    for name, found in times.items():
        trials[name].times = found
    for name, trial in trials.items():
        recorder.row(base.case.name, name, reason=trial.reason, **figures(base, trial, recorder))


def subject_of(base: DeviceModel, provider: str, device: str) -> Injection:
    if provider != NITER:
        return Injection(base, provider, device)
    subject = Injection(base, OURS, device)
    subject.method = Method("pissa_niter_4", {})
    return subject


def gated(base: DeviceModel, provider: str, device: str) -> ModelTrial:
    """A trial after its first run, which compiles what is left to compile."""
    trial = ModelTrial(subject=subject_of(base, provider, device))
    with trial.attempt():
        trial.subject.restore()
        before = start_peak(device)
        trial.first_seconds = timed(Unrestored(trial.subject), device)
        if before is not None:
            trial.peak_bytes = torch.cuda.max_memory_allocated() - before
        if isinstance(trial.subject.method.init, str):
            trial.accuracy = accuracy(base)
            trial.reason = rejection(provider, trial.accuracy, base)
    return trial


class Unrestored:
    """A subject that has been restored, so that its memory can be counted from there."""

    def __init__(self, subject: Injection) -> None:
        self.run = subject.run

    def restore(self) -> None:
        """Do nothing."""


def start_peak(device: str) -> int | None:
    """Reset the peak of the device's memory; bytes that are allocated now, None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def rejection(provider: str, found: Accuracy, base: DeviceModel) -> str | None:
    """Why a provider may not be timed, apart from comparisons with others."""
    if provider.startswith("peft"):
        return above("energy deficit", found.energy_deficit, BASELINE_LIMIT)
    if provider == NITER:
        return above("rounding", found.rounding, 1.0)
    return found.rejection(DTYPES[base.case.dtype])


def niter_rejection(trials: dict[str, ModelTrial]) -> str | None:
    """Our "pissa_niter_4" has to be as accurate as PEFT's on the same layers."""
    ours, theirs = trials[NITER].accuracy, trials[PEFT_NITER].accuracy
    if ours is None or theirs is None:
        return "PEFT failed, so that there is no baseline"
    return above("energy deficit", ours.energy_deficit, theirs.energy_deficit)


def figures(base: DeviceModel, trial: ModelTrial, recorder: Recorder) -> Row:
    """The figures of a row; ``scaled_ms`` is the shortest time, scaled to all layers of the model.

    ``init_s`` is the part of the last run in which our initializer ran; the rest is PEFT's.
    """
    layers, report = base.case.layers, trial.subject.report
    methods = Counter(layer.certificate.method for layer in report.layers) if report is not None else None
    adapter = sum(4 * base.case.rank * sum(module.weight.shape) for _, module in targets(base.model))
    row: Row = {"layers": layers, "rank": base.case.rank, "first_ms": 1e3 * trial.first_seconds} | trial.time_fields()
    if layers < recorder.settings.layers and trial.times is not None:
        row["scaled_ms"] = trial.times.min_ms * recorder.settings.layers / layers
    if report is not None:
        row["init_s"] = report.seconds
    row |= fields_of(Accuracy, trial.accuracy)
    row["peak_extra_mib"] = None if trial.peak_bytes is None else trial.peak_bytes / 2**20
    row["adapter_mib"] = adapter / 2**20
    if methods is not None:
        row |= {"methods": dict(methods), "fallbacks": methods.total() - methods[FIXED]}
    return row


def full_svd(recorder: Recorder) -> None:
    """One full SVD in float32, which PEFT's "pissa" computes for each weight."""
    width, device = recorder.settings.width, recorder.settings.device
    base = DeviceModel(recorder.settings.model(1, 1), device, device)
    weight = base.original(0, (width, width)).float()

    class Svd:
        def restore(self) -> None:
            pass

        def run(self) -> None:
            torch.linalg.svd(weight, full_matrices=False)

    first = timed(Svd(), device)
    recorder.row(
        f"svd-{width}x{width}-fp32", "torch.linalg.svd", first_ms=1e3 * first, min_ms=1e3 * timed(Svd(), device)
    )
