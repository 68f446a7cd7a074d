"""Where the time of ``get_peft_model`` goes: time by kernel, launches, host synchronizations, copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from ..harness.rows import Row
from ..harness.timing import timed
from ..models.injection import OURS, Injection
from .log import scrubbed
from .model import DeviceModel
from .record import Recorder
from .resident import Unrestored

LAYERS = 4
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
    base = DeviceModel(settings.model(LAYERS, 1), settings.device, settings.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (settings.device == "cuda")
    for rank in settings.ranks:
        base.case = dataclasses.replace(base.case, rank=rank)
        subject = Injection(base, OURS, settings.device)
        plain = min(timed(subject, settings.device) for _ in range(2))
        subject.restore()
        # the layers are initialized in threads of their own
        with profile(
            activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True)
        ) as profiler:
            seconds = timed(Unrestored(subject), settings.device)
        events = profiler.key_averages()
        key = "self_device_time_total" if settings.device == "cuda" else "self_cpu_time_total"
        table = scrubbed(events.table(sort_by=key, row_limit=LINES, max_name_column_width=90))
        (settings.folder / f"profile-r{rank}.txt").write_text(table, encoding="utf-8")
        print("\n".join(_narrow(line) for line in table.splitlines()[:PRINTED]))
        recorder.row(
            base.case.name,
            OURS,
            rank=rank,
            layers=base.case.layers,
            seconds=plain,
            profiled_s=seconds,
            device_s=device_seconds(events),
            **counts(events),
        )


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
