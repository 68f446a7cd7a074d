"""A model in the CPU's memory, initialized through the GPU, beside the time of copying its weights there and back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..harness.dtypes import DTYPES
from ..harness.rows import Row, fields_of
from ..harness.timing import Subject, Times, interleaved, timed
from ..models.injection import Injection, Method
from ..models.llama import targets
from .model import Accuracy, DeviceModel, accuracy
from .record import Recorder

STREAMED, COPIES = "ours pissa, through the GPU", "copies through pinned memory"
# Seconds of the budget below which only a part of the model is streamed.
ENOUGH_SECONDS, FEW = 60.0, 8
RAW_BYTES = {"cuda": 1 << 30, "cpu": 1 << 20}


def streamed(recorder: Recorder) -> None:
    settings = recorder.settings
    device, rank = settings.device, settings.ranks[0]
    raw_rates(recorder)
    small = DeviceModel(settings.model(1, rank), device, "cpu")
    timed(subject_of(small, device), device)  # compiles
    layers = settings.layers if settings.left() > ENOUGH_SECONDS else FEW
    base = DeviceModel(settings.model(layers, rank), device, "cpu")
    subject = subject_of(base, device)
    first = timed(subject, device)
    found = accuracy(base)
    reason = found.rejection(DTYPES[base.case.dtype])
    weights = [module.weight.data for _, module in targets(base.model)]
    size = sum(weight.nbytes for weight in weights)
    copies = PinnedCopies(weights, device)
    times: dict[str, Times] = {}
    if reason is None:
        subjects: dict[str, Subject] = {STREAMED: subject, COPIES: copies}
        times = interleaved(subjects, {STREAMED: first, COPIES: timed(copies, device)}, 1, device)
    assert subject.report is not None
    row: Row = {"layers": base.case.layers, "rank": rank, "bytes": size, "first_ms": 1e3 * first}
    ours = times.get(STREAMED)
    row |= fields_of(Times, ours) | fields_of(Accuracy, found) | {"init_s": subject.report.seconds}
    recorder.row(base.case.name, STREAMED, reason=reason, **row)
    if COPIES in times:
        seconds = times[COPIES].min_ms / 1e3
        fields = dataclasses.asdict(times[COPIES])
        recorder.row(base.case.name, COPIES, bytes=size, gb_per_s=2 * size / seconds / 1e9, **fields)


def subject_of(base: DeviceModel, device: str) -> Injection:
    subject = Injection(base, STREAMED, device)
    if device == "cpu":
        subject.method = Method("pissa", {}, on_cpu=True)
    return subject


class PinnedCopies:
    """Every weight to the device and back: a pinned buffer fills while the other one travels."""

    def __init__(self, weights: list[Tensor], device: str) -> None:
        self.weights = weights
        self.device = torch.device(device)
        self.cuda = device == "cuda"
        largest = max(weight.numel() for weight in weights)
        self.buffers = [torch.empty(largest, dtype=weights[0].dtype, pin_memory=self.cuda) for _ in range(4)]
        self.streams = [torch.cuda.Stream() for _ in range(2)] if self.cuda else []  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Nothing changes."""

    def run(self) -> None:
        leaving: list[tuple[Tensor, Tensor, int]] = []
        for index, weight in enumerate(self.weights):
            slot = index % 2
            there, back = (self.buffers[2 * slot + way][: weight.numel()] for way in range(2))
            if len(leaving) == 2:
                self._arrive(*leaving.pop(0))
            there.copy_(weight.flatten())
            if self.cuda:
                with torch.cuda.stream(self.streams[slot]):
                    back.copy_(there.to(self.device, non_blocking=True), non_blocking=True)
            else:
                back.copy_(there.clone())
            leaving.append((weight, back, slot))
        for arrival in leaving:
            self._arrive(*arrival)

    def _arrive(self, weight: Tensor, back: Tensor, slot: int) -> None:
        if self.cuda:
            self.streams[slot].synchronize()
        weight.copy_(back.view_as(weight))


def raw_rates(recorder: Recorder) -> None:
    """Bytes per second of one large copy between pinned memory and the device, in each direction."""
    device = recorder.settings.device
    host = torch.zeros(RAW_BYTES[device] // 4, pin_memory=device == "cuda")
    there = torch.zeros_like(host, device=device)

    class Copy:
        def __init__(self, target: Tensor, source: Tensor) -> None:
            self.target = target
            self.source = source

        def restore(self) -> None:
            pass

        def run(self) -> None:
            self.target.copy_(self.source, non_blocking=True)

    for name, copy in (("to the device", Copy(there, host)), ("to the host", Copy(host, there))):
        seconds = min(timed(copy, device) for _ in range(3))
        recorder.row(f"pinned copy {name}", "torch", gb_per_s=host.nbytes / seconds / 1e9)
