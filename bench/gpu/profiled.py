"""Where the time of ``get_peft_model`` and of one SVD goes: by kernel, launches, host synchronizations, copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

import pissa_kernels as pk

from ..harness.rows import Row
from ..harness.timing import Subject, timed
from ..models.injection import OURS, Injection
from .log import scrubbed
from .model import DeviceModel
from .record import Recorder
from .resident import Unrestored

LINES, PRINTED = 60, 24
# Names of events, as CUDA and torch have them; an event counts for the first of these that it contains.
COUNTED = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel", "hipExtLaunchKernel"),
    "stream_waits": ("cudaStreamSynchronize", "hipStreamSynchronize"),
    "device_waits": ("cudaDeviceSynchronize", "hipDeviceSynchronize"),
    "event_waits": ("cudaEventSynchronize", "hipEventSynchronize"),
    "items": ("aten::_local_scalar_dense",),
    "copies_to_host": ("Memcpy DtoH", "CopyDeviceToHost"),
    "copies_to_device": ("Memcpy HtoD", "CopyHostToDevice"),
    "allocations": ("cudaMalloc", "cudaHostAlloc", "hipMalloc", "hipHostMalloc"),
}


def profile_injection(recorder: Recorder) -> None:
    """A table for each rank in the folder of the run, its first lines on the terminal, and a row of counts."""
    settings = recorder.settings
    base = DeviceModel(settings.model(settings.layers, 1), settings.device, settings.device)
    for rank in settings.ranks:
        base.case = dataclasses.replace(base.case, rank=rank)
        subject = Injection(base, OURS, settings.device)
        plain = min(timed(subject, settings.device) for _ in range(2))
        subject.restore()
        profiled(f"profile-r{rank}", base.case.name, rank, plain, Unrestored(subject), recorder)
    for rank in settings.ranks:
        subject_of_one = OneWeight(base.original(0, (settings.width, settings.width)), rank)
        plain = min(timed(subject_of_one, settings.device) for _ in range(3))
        profiled(f"profile-one-r{rank}", subject_of_one.name, rank, plain, subject_of_one, recorder)


class OneWeight:
    """The SVD of one weight, which waits for its results."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        self.weight = weight
        self.rank = rank
        self.name = f"one-{weight.shape[0]}x{weight.shape[1]}-r{rank}"

    def restore(self) -> None:
        """Nothing changes."""

    def run(self) -> None:
        pk.truncated_svd(self.weight, self.rank)


def profiled(table_name: str, case: str, rank: int, plain: float, subject: Subject, recorder: Recorder) -> None:
    """Profile one run of a subject, after ``plain`` seconds without the profiler."""
    settings = recorder.settings
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (settings.device == "cuda")
    # the layers are initialized in threads of their own
    options = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=options) as profiler:
        seconds = timed(subject, settings.device)
    events = profiler.key_averages()
    key = "self_device_time_total" if settings.device == "cuda" else "self_cpu_time_total"
    table = scrubbed(events.table(sort_by=key, row_limit=LINES, max_name_column_width=90))
    (settings.folder / f"{table_name}.txt").write_text(table, encoding="utf-8")
    print("\n".join(_narrow(line) for line in table.splitlines()[:PRINTED]))
    found = {"seconds": plain, "profiled_s": seconds, "device_s": device_seconds(events), **counts(events)}
    recorder.row(case, OURS, rank=rank, **found)


def device_seconds(events: Iterable[Any]) -> float:
    """Seconds in which the GPU was busy; events on the CPU repeat the times of the kernels that they launch."""
    return sum(float(event.self_device_time_total) for event in events if event.device_type != DeviceType.CPU) / 1e6


def counts(events: Iterable[Any]) -> Row:
    """Number of events of each kind in :data:`COUNTED`."""
    found: Row = dict.fromkeys(COUNTED, 0)
    for event in events:
        for kind, names in COUNTED.items():
            if any(name in event.key for name in names):
                found[kind] += event.count
                break
    return found


def _narrow(line: str) -> str:
    """The name, and the last columns of a wide table: device time and calls."""
    return line if len(line) <= 120 else f"{line[:60]} {line[-59:]}"
