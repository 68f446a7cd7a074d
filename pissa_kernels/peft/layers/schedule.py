"""The layers of a model, initialized together on the devices that hold their weights.

On the CPU each weight is one job that a single thread runs from start to end, with as many jobs at once as torch has
threads: a block Krylov SVD is a chain of small steps, half of which leave a second core idle, while layers do not
depend on each other. So the result of a layer does not depend on the number of cores. On a GPU, layers of equal shape
form batches whose small problems are solved together; several GPUs work at the same time, each with a thread, streams,
pinned buffers and a memory budget of its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ...checks import layer_context
from ...numerics import exact_arithmetic
from ...report import LayerReport
from ...runtime import memory
from ...runtime.workers import run_jobs
from .batches import Emit, needed_bytes, plan_batches, run_batches
from .layer import LayerJob
from .several_gpus import divide
from .sharded_run import run_sharded
from .stack_run import StackRun, Work, is_shared

CPU = torch.device("cpu")
Finished = tuple[LayerJob, LayerReport]


@dataclass(frozen=True)
class Resources:
    """What a run may use.

    Attributes:
        devices: where weights that are on the CPU are decomposed; none for the CPU itself.
        memory_budget: bytes beyond the model and the adapter, on each device; None for half of what is free there.
    """

    devices: tuple[torch.device, ...] = ()
    memory_budget: int | None = None

    def budget(self, device: torch.device) -> int:
        """Bytes that may be used on ``device``."""
        return self.memory_budget if self.memory_budget is not None else memory.free(device) // 2


def run(jobs: Sequence[LayerJob], resources: Resources, done: Emit) -> None:
    """Initialize every layer.

    Args:
        jobs: the layers.
        resources: what may be used.
        done: called with each layer and its report, in the calling thread, in the order in which they finish.

    Raises:
        ValueError: the budget is too small for a layer, before anything is written; or a layer's values are refused.
        RuntimeError, MemoryError: with the name of the layer. After any exception, KeyboardInterrupt included, each
            layer is either initialized and passed to ``done``, or unchanged.
    """
    # before all others, at which a single process may fail while the rest wait for it
    run_sharded([job for job in jobs if job.is_sharded], resources.memory_budget, done)
    jobs = [job for job in jobs if not job.is_sharded]
    budget = functools.cache(resources.budget)  # what is free may change
    by_device = divide(jobs, resources.devices, budget)
    budgets = {device: budget(device) for device in by_device}
    for device, share in by_device.items():
        _check_budget(share, device, budgets[device])
    stop = threading.Event()
    on_cpu = by_device.pop(CPU, [])
    workers = _workers(on_cpu, budgets.get(CPU, 0)) if on_cpu else 0
    threads = torch.get_num_threads()
    on_cpu.sort(key=lambda job: -job.weight.numel())  # small ones last, so that no thread is left with a large one
    each = max(1, threads // workers) if workers else 1
    work: list[Callable[[Callable[[Finished], None]], None]] = []
    for device, share in by_device.items():  # before the CPU's layers, so that each of them has a thread at once
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        batches = plan_batches([job for job in share if job.is_batched], device, budgets[device])
        alone = [job for job in share if not job.is_batched]
        work.append(functools.partial(_run_device, batches, alone, device, budgets[device], stream, stop))
    work += [functools.partial(_run_on_cpu, part, each) for job in on_cpu for part in _parts(job, workers)]
    # the precision of float32 products is a setting of the process, so it is set once for all threads
    with exact_arithmetic(CPU):
        try:
            run_jobs(work, workers + len(by_device), lambda finished: done(*finished), stop)
        finally:
            torch.set_num_threads(threads)  # MKL's number of threads belongs to the process too


def _parts(job: LayerJob, workers: int) -> Iterator[Work]:
    """The work on a layer: of its matrices one by one, where there are several."""
    if is_shared(job):
        yield from StackRun(job, workers).work()
    else:
        yield lambda emit: emit((job, job.run()))


def _run_on_cpu(work: Work, threads: int, emit: Callable[[Finished], None]) -> None:
    torch.set_num_threads(threads)  # for this worker only, except in MKL
    with exact_arithmetic(CPU):
        work(emit)


def _run_device(
    batches: Sequence[list[LayerJob]],
    alone: Sequence[LayerJob],
    device: torch.device,
    budget: int,
    stream: torch.cuda.Stream | None,
    stop: threading.Event,
    emit: Callable[[Finished], None],
) -> None:
    with torch.cuda.stream(stream):  # of the caller, which selects its device, too; None does nothing
        run_batches(batches, device, lambda job, report: emit((job, report)), stop)
        for job in alone:
            if stop.is_set():
                return
            with exact_arithmetic(device):
                emit((job, job.run(device, budget)))


def _workers(jobs: Sequence[LayerJob], budget: int) -> int:
    largest = max(job.workspace(CPU) for job in jobs)
    return max(1, min(torch.get_num_threads(), sum(job.parts for job in jobs), budget // largest))


def _check_budget(jobs: Sequence[LayerJob], device: torch.device, budget: int) -> None:
    for job in jobs:
        needed = needed_bytes(job, device)
        if needed > budget:
            with layer_context(job.label):
                raise ValueError(
                    f"the SVD needs {needed:,} bytes on {device} beyond the model, more than the budget of {budget:,}; "
                    f"pass a memory_budget of at least {needed:,}"
                )
