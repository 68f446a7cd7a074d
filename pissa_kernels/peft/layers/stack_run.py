"""A layer of several matrices on a CPU, such as a stack of experts: its matrices are shared among the threads.

All of them are decomposed before the first is changed, so that one that is refused leaves the layer as it was.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from ...checks import layer_context
from ...factors import Factors
from ...report import LayerReport
from ..weights.record import fingerprint, records
from .layer import LayerJob

Emit = Callable[[tuple[LayerJob, LayerReport]], None]
Work = Callable[[Emit], None]


def is_shared(job: LayerJob) -> bool:
    """Whether a layer has several original matrices, which need an SVD each, in memory that threads can share."""
    kept = records(job.layer) or records(job.layout.module, job.layout.parameter)
    return job.parts > 1 and job.is_view and job.given is None and not kept


class StackRun:
    """The initialization of one layer, for :func:`is_shared`.

    Args:
        job: the layer.
        threads: number of threads that change its matrices.

    Raises:
        ValueError: an adapter is merged.
    """

    def __init__(self, job: LayerJob, threads: int) -> None:
        with layer_context(job.label):
            job.reuse_previous()
        self.job, self.threads = job, threads
        self._lock = threading.Lock()
        self._decomposed = threading.Event()
        self._found: dict[int, Factors] = {}
        self._left = job.parts
        self._began = 0.0

    def work(self) -> Iterator[Work]:
        """The work, in the order in which threads have to start it."""
        for index in range(self.job.parts):
            yield functools.partial(self._decompose, index)
        yield self._write

    def _decompose(self, index: int, emit: Emit) -> None:
        self._began = self._began or time.perf_counter()
        try:
            self._found[index] = self.job.decompose(index)
        finally:
            with self._lock:
                self._left -= 1
                if not self._left:
                    self._decomposed.set()

    def _write(self, emit: Emit) -> None:
        """Write A, B and all residuals: one piece of work, which a failure elsewhere does not stop in the middle."""
        self._decomposed.wait()  # for the other threads: all matrices have been started
        if len(self._found) < self.job.parts:
            return  # one of them is refused, and its thread has raised the reason
        job, factors = self.job, [self._found[part] for part in range(self.job.parts)]
        with layer_context(job.label):
            joined, before = job.joined(factors), fingerprint(job.weight)
            kept = job.kept(factors, job.adapter_dtype, joined)
            with job.restored_on_failure():
                job.set_adapter(*joined)
                self._subtract_all()
            seconds = time.perf_counter() - self._began
            emit((job, job.record(kept, before, fingerprint(job.weight), seconds, job.weight.dtype)))

    def _subtract_all(self) -> None:
        """Make a residual of every matrix; after an exception of none, to rounding."""
        done: list[int] = []

        def subtract(index: int) -> None:
            torch.set_num_threads(1)
            self.job.subtract([self._found[index]], index)
            done.append(index)

        try:
            with ThreadPoolExecutor(self.threads) as pool:
                for _ in pool.map(subtract, range(self.job.parts)):
                    pass
        except BaseException:
            for index in done:
                self.job.subtract([self._found[index]], index, undo=True)
            raise
