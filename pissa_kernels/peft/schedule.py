"""A whole model: many layers planned together, and carried out where their weights are.

On the CPU every layer is one job, done from start to end by one thread, as many at once as there are threads: an SVD by
block Krylov is a chain of small steps, half of which leave a second core idle, while layers do not wait for each other.
A layer's result does not depend on the number of cores then. On a GPU, layers of equal shape are stacked into batches,
whose small problems are solved together; several GPUs work at once.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..numerics import exact_arithmetic
from ..report import LayerReport
from ..runtime import memory
from ..runtime.workers import run_jobs
from .batches import Emit, plan_batches, run_batches
from .layer import LayerJob

CPU = torch.device("cpu")
Finished = tuple[LayerJob, LayerReport]


@dataclass(frozen=True)
class Resources:
    """What a run may use.

    Attributes:
        device: where to do the work for weights that are on the CPU; None for the CPU itself.
        memory_budget: bytes beyond model and adapter, on each device; None for half of what is free there.
    """

    device: torch.device | None = None
    memory_budget: int | None = None

    def place(self, job: LayerJob) -> torch.device:
        """Where a layer's work is done."""
        at = job.weight.device
        return self.device if at.type == "cpu" and self.device is not None else at

    def budget(self, device: torch.device) -> int:
        """Bytes that may be used on ``device``."""
        return self.memory_budget if self.memory_budget is not None else memory.free(device) // 2


def run(jobs: Sequence[LayerJob], resources: Resources, done: Emit) -> None:
    """Initialise every layer.

    Args:
        jobs: the layers.
        resources: what may be used.
        done: told of each layer, in the calling thread, in the order in which they finish.

    Raises:
        ValueError: the budget is too small for a layer, before anything is written; or a layer's values were refused.
        RuntimeError, MemoryError: with the layer's name. After any exception, an interrupt included, each layer is
            either done, and ``done`` was told, or as it was.
    """
    places: dict[torch.device, list[LayerJob]] = defaultdict(list)
    for job in jobs:
        places[resources.place(job)].append(job)
    budgets = {place: resources.budget(place) for place in places}
    for place, some in places.items():
        _check_budget(some, place, budgets[place])
    stop = threading.Event()
    on_cpu = places.pop(CPU, [])
    workers = _workers(on_cpu, budgets.get(CPU, 0)) if on_cpu else 0
    threads = torch.get_num_threads()
    on_cpu.sort(key=lambda job: -job.weight.numel())  # small ones last, so that no thread is left with a large one
    work = [functools.partial(_one_layer, job, max(1, threads // workers)) for job in on_cpu]
    for place, some in places.items():
        work.append(functools.partial(_batches, plan_batches(some, place, budgets[place]), place, stop))
    # the precision of float32 products is the process's, so it is set here, once for all threads
    with exact_arithmetic(CPU):
        try:
            run_jobs(work, workers + len(places), lambda finished: done(*finished), stop)
        finally:
            torch.set_num_threads(threads)  # MKL's number is the process's too


def _one_layer(job: LayerJob, threads: int, emit: Callable[[Finished], None]) -> None:
    torch.set_num_threads(threads)  # of this worker alone, except MKL's
    emit((job, job.run()))


def _batches(
    batches: Sequence[list[LayerJob]], place: torch.device, stop: threading.Event, emit: Callable[[Finished], None]
) -> None:
    run_batches(batches, place, lambda job, report: emit((job, report)), stop)


def _workers(jobs: Sequence[LayerJob], budget: int) -> int:
    largest = max(job.workspace(CPU) for job in jobs)
    return max(1, min(torch.get_num_threads(), len(jobs), budget // largest))


def _check_budget(jobs: Sequence[LayerJob], place: torch.device, budget: int) -> None:
    for job in jobs:
        needed = job.workspace(place)
        if place != job.weight.device:
            needed += job.weight.nbytes
        if needed > budget:
            raise ValueError(
                f"{job.label}: its SVD needs {needed:,} bytes on {place} beyond the model, more than the {budget:,} "
                "that it may use; give a memory_budget of at least as much"
            )
