"""Free memory of a device, and the peak memory of a run."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import torch

# Between two samples of the resident set. A sample takes some ten microseconds.
INTERVAL_SECONDS = 0.005
STATM = Path("/proc/self/statm")
MEMINFO = Path("/proc/meminfo")


def free(device: torch.device) -> int:
    """Bytes that can be allocated on ``device``; on the CPU without swapping, as estimated by the system.

    The memory limit of a container is not considered. Where it is lower, pass a budget.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch allocates from it
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if MEMINFO.is_file():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, OSError, ValueError):  # Windows
        return 4 << 30


class Peak:
    """Context that measures by how much the memory of this process grows, on the CPU and on each GPU.

    The resident set is sampled by a thread. On a GPU the peak is an upper bound if more memory was in use before the
    context began, because torch's peak statistics belong to the user and are not reset.
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
        """Growth at the peak so far, in bytes: resident set plus torch's peak on each GPU; None if not available."""
        if not self._resident or self._at_end is not None:
            return self._at_end
        self._highest = max(self._highest, resident() or 0)
        on_gpus = (torch.cuda.max_memory_allocated(gpu) - self._before[gpu] for gpu in self._gpus)
        return self._highest - self._resident + sum(on_gpus)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._highest = max(self._highest, resident() or 0)


def resident() -> int | None:
    """Resident set of this process in bytes; None where the system does not report it."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return None
