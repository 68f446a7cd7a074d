"""Layers of equal shape as one batch: on a GPU, and through a GPU for weights that are on the CPU."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from .. import ops
from ..checks import layer_context
from ..numerics import exact_arithmetic
from ..pissa import Factors, principal_factors_of_batch
from ..report import LayerReport
from ..runtime.transfer import PinnedTransfer
from .layer import LayerJob

Emit = Callable[[LayerJob, LayerReport], None]
# Stacks of streamed weights that exist at once: one arrives, one is decomposed, one leaves.
IN_FLIGHT = 3


def plan_batches(jobs: Sequence[LayerJob], device: torch.device, budget: int) -> list[list[LayerJob]]:
    """Group layers that can share a batch, as many as fit the budget, ordered by the first layer of each batch.

    Args:
        jobs: layers to decompose on ``device``.
        device: the device.
        budget: bytes on it for the weights of a batch and their workspace.
    """
    kinds: dict[tuple[object, ...], list[LayerJob]] = defaultdict(list)
    for job in jobs:
        weight, recipe = job.weight, job.recipe
        accuracy = (recipe.rank, recipe.init, recipe.seed)
        kinds[weight.device, weight.shape, weight.dtype, job.transposed, accuracy].append(job)
    batches = []
    for alike in kinds.values():
        first = alike[0]
        stacks = 1 if first.weight.device == device else IN_FLIGHT
        most = max(1, budget // (first.workspace(device) + stacks * first.weight.nbytes))
        count = -(-len(alike) // most)
        batches += [alike[index * len(alike) // count : (index + 1) * len(alike) // count] for index in range(count)]
    return batches


def run_batches(batches: Sequence[list[LayerJob]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Initialize batches one after another, until ``stop`` is set.

    A batch that runs out of memory, or has a weight that is refused, is halved until the layer that fails is alone; the
    error names it.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for batch in batches:
            if batch[0].weight.device == device and not stop.is_set():
                _resident(batch, emit)
        moved = [_without_reused(batch, emit) for batch in batches if batch[0].weight.device != device]
        _streamed([batch for batch in moved if batch], device, emit, stop)


def _resident(batch: list[LayerJob], emit: Emit) -> None:
    began = time.perf_counter()
    with _or_in_halves(batch, lambda half: _resident(half, emit)):
        batch = _without_reused(batch, emit)
        if batch:
            found = _factors(batch, torch.stack([job.weight for job in batch]))
            share = (time.perf_counter() - began) / len(batch)
            for job, factors in zip(batch, found, strict=True):
                emit(job, job.write(factors, time.perf_counter() - share))


def _streamed(batches: Sequence[list[LayerJob]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Decompose each batch while the next one arrives and the residuals of the previous one leave."""
    if not batches:
        return
    to_device, to_host = PinnedTransfer(device).to_device, PinnedTransfer(device).to_host

    def alone(batch: list[LayerJob]) -> None:
        transfer = PinnedTransfer(device)  # the buffers of the others are in use by the neighboring batches
        with _or_in_halves(batch, alone):
            batch = _without_reused(batch, emit)
            if not batch:
                return
            began = time.perf_counter()
            stack = transfer.to_device([job.weight for job in batch])
            found = _subtracted(batch, stack)
            _leave(batch, found, (time.perf_counter() - began) / len(batch), transfer.to_host(stack), emit)

    with ThreadPoolExecutor(1) as pool:
        leaving: list[Future[None]] = []
        for batch, arrival in _arrivals(batches, to_device):
            if stop.is_set():
                break
            began = time.perf_counter()
            try:
                stack = arrival.result()
                found = _subtracted(batch, stack)
            except (torch.OutOfMemoryError, ValueError):
                alone(batch)
                continue
            while leaving:
                leaving.pop().result()
            share = (time.perf_counter() - began) / len(batch)
            leaving.append(pool.submit(_leave, batch, found, share, to_host(stack), emit))
            del stack
        while leaving:
            leaving.pop().result()


def _arrivals(
    batches: Sequence[list[LayerJob]], to_device: Callable[[list[Tensor]], Tensor]
) -> Iterator[tuple[list[LayerJob], Future[Tensor]]]:
    """Yield each batch with its stacked weights, while the next one is being copied."""
    with ThreadPoolExecutor(1) as pool:
        coming: list[Future[Tensor]] = []
        for index in range(len(batches) + 1):
            if coming:
                wait(coming)
            arrived = coming
            coming = [pool.submit(to_device, [job.weight for job in batch]) for batch in batches[index : index + 1]]
            if arrived:
                yield batches[index - 1], arrived.pop()


def _subtracted(batch: list[LayerJob], stack: Tensor) -> list[Factors]:
    """Factors of every weight in ``stack``, which holds the residuals afterwards."""
    found = _factors(batch, stack)
    with exact_arithmetic(stack.device):
        for job, weight, factors in zip(batch, stack, found, strict=True):
            ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, job.recipe.scaling, job.transposed)
    if stack.is_cuda:
        torch.cuda.current_stream(stack.device).synchronize()  # the copy back runs on a stream of its own
    return found


def _leave(batch: list[LayerJob], found: list[Factors], share: float, residuals: Iterator[Tensor], emit: Emit) -> None:
    for job, factors, residual in zip(batch, found, residuals, strict=True):
        emit(job, job.write(factors, time.perf_counter() - share, residual=residual))


def _factors(batch: list[LayerJob], stack: Tensor) -> list[Factors]:
    views = stack.mT if batch[0].transposed else stack
    return principal_factors_of_batch(views, [job.recipe for job in batch])


def _without_reused(batch: list[LayerJob], emit: Emit) -> list[LayerJob]:
    """The layers of a batch that need an SVD; the others are initialized here."""
    left = []
    for job in batch:
        with layer_context(job.label):
            report = job.reuse_previous()
        if report:
            emit(job, report)
        else:
            left.append(job)
    return left


@contextlib.contextmanager
def _or_in_halves(batch: list[LayerJob], again: Callable[[list[LayerJob]], None]) -> Iterator[None]:
    try:
        with layer_context(batch[0].label) if len(batch) == 1 else contextlib.nullcontext():
            yield
    except (torch.OutOfMemoryError, ValueError) as error:
        if len(batch) > 1:
            failure = None
        elif isinstance(error, ValueError):
            raise
        else:
            failure = type(error)(str(error))
    else:
        return
    # outside the handler, whose traceback refers to the tensors that filled the memory
    if failure is not None:
        raise failure
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    again(batch[: len(batch) // 2])
    again(batch[len(batch) // 2 :])
