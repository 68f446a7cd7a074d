"""A layer of several matrices on a CPU, such as a stack of experts: its matrices are shared among the threads.

All of them are decomposed before the first is changed, so that one that is refused leaves the layer as it was.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator

from torch import Tensor

from ..checks import layer_context
from ..pissa import Factors
from ..report import LayerReport
from .layer import LayerJob
from .record import fingerprint, records
from .writing import Kept

Emit = Callable[[tuple[LayerJob, LayerReport]], None]
Work = Callable[[Emit], None]


def is_shared(job: LayerJob) -> bool:
    """Whether a layer has several original matrices, which need an SVD each."""
    kept = records(job.layer) or records(job.layout.module, job.layout.parameter)
    return job.parts > 1 and job.given is None and not kept


class StackRun:
    """The initialization of one layer, for :func:`is_shared`.

    Args:
        job: the layer.

    Raises:
        ValueError: an adapter is merged.
    """

    def __init__(self, job: LayerJob) -> None:
        with layer_context(job.label):
            job.reuse_previous()
        self.job = job
        self._lock = threading.Lock()
        self._decomposed = threading.Event()
        self._found: dict[int, Factors] = {}
        self._left = dict.fromkeys(("decompose", "write"), job.parts)
        self._began = 0.0
        self._kept: tuple[Kept, Tensor] | None = None

    def work(self) -> Iterator[Work]:
        """The work, in the order in which threads have to start it."""
        for phase in (self._decompose, self._write):
            for index in range(self.job.parts):
                yield functools.partial(phase, index)

    def _decompose(self, index: int, emit: Emit) -> None:
        self._began = self._began or time.perf_counter()
        try:
            self._found[index] = self.job.decompose(index)
        finally:
            if self._is_last("decompose"):
                self._decomposed.set()

    def _write(self, index: int, emit: Emit) -> None:
        self._decomposed.wait()  # for the other threads: all matrices have been started
        if len(self._found) < self.job.parts:
            return  # one of them is refused, and its thread has raised the reason
        with layer_context(self.job.label):
            with self._lock:
                if self._kept is None:
                    factors = [self._found[part] for part in range(self.job.parts)]
                    self._kept = self.job.kept(factors, self.job.adapter_dtype), fingerprint(self.job.weight)
                    self.job.set_adapter(*self.job.joined(factors))
            self.job.subtract([self._found[index]], index)
            if self._is_last("write"):
                kept, before = self._kept
                after, dtype = fingerprint(self.job.weight), self.job.weight.dtype
                seconds = time.perf_counter() - self._began
                emit((self.job, self.job.record(kept, before, after, seconds, dtype)))

    def _is_last(self, phase: str) -> bool:
        with self._lock:
            self._left[phase] -= 1
            return not self._left[phase]
