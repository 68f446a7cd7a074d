"""Memory of a device: what is free, and what a run takes at its peak."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import torch

# Between two looks at the resident set. A look takes some ten microseconds.
INTERVAL_SECONDS = 0.005
STATM = Path("/proc/self/statm")
MEMINFO = Path("/proc/meminfo")


def free(device: torch.device) -> int:
    """Bytes that can be allocated on ``device``; on the CPU without swapping, as the system estimates it.

    A container's own limit is not asked for: where it is the tighter one, give a budget.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if MEMINFO.is_file():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, OSError, ValueError):  # Windows
        return 4 << 30


class Peak:
    """Context: the most that this process grows meanwhile, on the CPU and on each GPU.

    Attributes:
        extra_bytes: by which the resident set grew at its peak so far (sampled), plus torch's own peak on each GPU;
            None where the system does not tell. A GPU's is an upper bound where more had been in use earlier: torch's
            statistics are the user's and are not reset.
    """

    def __init__(self) -> None:
        self._resident = 0
        self._at_end: int | None = None
        self._stop = threading.Event()
        self._highest = 0
        self._thread = threading.Thread(target=self._watch, daemon=True, name="pissa_kernels-peak")

    def __enter__(self) -> Peak:
        self._gpus = range(torch.cuda.device_count())
        self._before = [torch.cuda.memory_allocated(gpu) for gpu in self._gpus]
        self._resident = self._highest = resident() or 0
        if self._resident:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._resident:
            self._at_end = self.extra_bytes
            self._stop.set()
            self._thread.join()

    @property
    def extra_bytes(self) -> int | None:
        if not self._resident or self._at_end is not None:
            return self._at_end
        self._highest = max(self._highest, resident() or 0)
        on_gpus = (torch.cuda.max_memory_allocated(gpu) - self._before[gpu] for gpu in self._gpus)
        return self._highest - self._resident + sum(on_gpus)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._highest = max(self._highest, resident() or 0)


def resident() -> int | None:
    """Bytes of this process that are in memory; None where the system does not tell."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return None
