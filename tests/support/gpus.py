"""Three GPUs that a CPU stands in for: their names, their streams, and batches that are streamed through them."""

from __future__ import annotations

import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pissa_kernels.peft.layers import batches
from pissa_kernels.peft.layers.layer import LayerJob

from .streams import Stream, Streams

GPUS = tuple(torch.device("cuda", index) for index in range(3))
NO_SUCH_DEVICE = "CUDA error: invalid device ordinal\nGPU device may be out of range, do you have enough GPUs?"
# Seconds that a thread waits for another before its test fails.
PATIENCE = 20.0


class Gpus:
    """What has been streamed.

    Attributes:
        streams: stream of the caller on each GPU.
        batches: names of the layers in each batch, of each GPU.
        threads: thread of each GPU, with its stream.
        stop: set to stop the run; None before it.
        together: number of GPUs that wait for one another before they start; 0 for none.
    """

    def __init__(self) -> None:
        self.streams = {gpu: Stream(name=str(gpu)) for gpu in GPUS}
        self.batches: dict[torch.device, list[list[str | None]]] = defaultdict(list)
        self.threads: dict[torch.device, tuple[int, Any]] = {}
        self.stop: threading.Event | None = None
        self.together = 0
        self._barrier: threading.Barrier | None = None
        self._lock = threading.Lock()

    def started(self, gpu: torch.device, planned: list[list[LayerJob]], stop: threading.Event) -> None:
        with self._lock:
            self.batches[gpu] += [[job.name for job in batch] for batch in planned]
            self.threads[gpu] = threading.get_ident(), torch.cuda.current_stream()
            self.stop = stop
            self._barrier = self._barrier or threading.Barrier(max(1, self.together))
        self._barrier.wait(PATIENCE)  # BrokenBarrierError, a RuntimeError, where one GPU starts after another has ended

    def current(self) -> torch.device:
        """The GPU of this thread."""
        return next(gpu for gpu, (thread, _) in self.threads.items() if thread == threading.get_ident())


@pytest.fixture
def gpus(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Streaming to one of :data:`GPUS` goes through the CPU, with all threads and copies that it has on a GPU."""
    made, empty, streamed = Gpus(), torch.empty, batches._streamed

    def empty_on(*size: Any, device: Any = None, **rest: Any) -> Any:
        place = torch.device("cpu" if device is None else device)
        if place.type != "cuda":
            return empty(*size, device=device, **rest)
        if (place.index or 0) >= len(GPUS):
            raise RuntimeError(NO_SUCH_DEVICE)
        return SimpleNamespace(device=torch.device("cuda", place.index or 0))

    def through_the_cpu(
        planned: list[list[LayerJob]], device: torch.device, emit: batches.Emit, stop: threading.Event
    ) -> None:
        made.started(device, planned, stop)
        streamed(planned, torch.device("cpu"), emit, stop)

    def current_stream(device: Any = None) -> Any:
        own = streams.current()
        return made.streams[device] if own is streams.default and device in made.streams else own

    monkeypatch.setattr(torch, "empty", empty_on)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(batches, "_streamed", through_the_cpu)
    return made
