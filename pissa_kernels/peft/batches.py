"""Layers of equal shape as one stack: on a GPU, and through a GPU for weights that are on the CPU."""

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
from ..checks import parse_init
from ..numerics import exact_arithmetic
from ..pissa import Factors, rounded_factors, tolerance
from ..report import LayerReport
from ..runtime.transfer import PinnedTransfer
from ..svd.driver import truncated_svd_stack
from .layer import LayerJob

Emit = Callable[[LayerJob, LayerReport], None]
# Stacks of streamed weights that exist at once: one arrives, one is computed on, one leaves.
IN_FLIGHT = 3


def plan_batches(tasks: Sequence[LayerJob], device: torch.device, budget: int) -> list[list[LayerJob]]:
    """Layers that can share a stack, no more than fit the budget, in the order of their first.

    Args:
        tasks: layers whose work is done on ``device``.
        device: where.
        budget: bytes on it, for a batch's stack and its workspace.
    """
    kinds: dict[tuple[object, ...], list[LayerJob]] = defaultdict(list)
    for task in tasks:
        weight = task.weight
        key = (weight.device, weight.shape, weight.dtype, task.transposed, task.rank, task.init, task.seed)
        kinds[key].append(task)
    batches = []
    for alike in kinds.values():
        first = alike[0]
        stacks = 1 if first.weight.device == device else IN_FLIGHT
        most = max(1, budget // (first.workspace(device) + stacks * first.weight.nbytes))
        count = -(-len(alike) // most)
        batches += [alike[index * len(alike) // count : (index + 1) * len(alike) // count] for index in range(count)]
    return batches


def run_batches(batches: Sequence[list[LayerJob]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Carry out batches one after another, or until ``stop``.

    A batch that runs out of memory, or holds a weight that is refused, is halved until one layer is left that cannot be
    done; its error names it.
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
            found = _factors(batch, torch.stack([task.weight for task in batch]))
            share = (time.perf_counter() - began) / len(batch)
            for task, factors in zip(batch, found, strict=True):
                emit(task, task.write(factors, time.perf_counter() - share))


def _streamed(batches: Sequence[list[LayerJob]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Each batch is computed on while the next one arrives and the residuals of the last one leave."""
    if not batches:
        return
    to_device, take = PinnedTransfer(device).to_device, PinnedTransfer(device).to_host

    def alone(batch: list[LayerJob]) -> None:
        apart = PinnedTransfer(device)  # the others are under way with their neighbours
        with _or_in_halves(batch, alone):
            batch = _without_reused(batch, emit)
            if not batch:
                return
            began = time.perf_counter()
            stack = apart.to_device([task.weight for task in batch])
            found = _subtracted(batch, stack)
            _leave(batch, found, (time.perf_counter() - began) / len(batch), apart.to_host(stack), emit)

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
            leaving.append(pool.submit(_leave, batch, found, share, take(stack), emit))
            del stack
        while leaving:
            leaving.pop().result()


def _arrivals(
    batches: Sequence[list[LayerJob]], to_device: Callable[[list[Tensor]], Tensor]
) -> Iterator[tuple[list[LayerJob], Future[Tensor]]]:
    """Each batch with its stack, while the next one is on its way."""
    with ThreadPoolExecutor(1) as pool:
        coming: list[Future[Tensor]] = []
        for index in range(len(batches) + 1):
            if coming:
                wait(coming)
            arrived = coming
            coming = [pool.submit(to_device, [task.weight for task in batch]) for batch in batches[index : index + 1]]
            if arrived:
                yield batches[index - 1], arrived.pop()


def _subtracted(batch: list[LayerJob], stack: Tensor) -> list[Factors]:
    """The factors of every weight in the stack, which holds the residuals afterwards."""
    found = _factors(batch, stack)
    with exact_arithmetic(stack.device):
        for task, weight, factors in zip(batch, stack, found, strict=True):
            ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, task.scaling, task.transposed)
    if stack.is_cuda:
        torch.cuda.current_stream(stack.device).synchronize()  # the stack goes to a thread of its own stream
    return found


def _leave(batch: list[LayerJob], found: list[Factors], share: float, residuals: Iterator[Tensor], emit: Emit) -> None:
    for task, factors, residual in zip(batch, found, residuals, strict=True):
        emit(task, task.write(factors, time.perf_counter() - share, residual=residual))


def _factors(batch: list[LayerJob], stack: Tensor) -> list[Factors]:
    first = batch[0]
    views = stack.mT if first.transposed else stack
    try:
        found = truncated_svd_stack(
            views, first.rank, tol=tolerance(stack.dtype), niter=parse_init(first.init), seed=first.seed
        )
    except ValueError as error:  # which of them it is shows when the batch has been halved
        raise ValueError(f"the weight of {first.where} {tuple(first.weight.shape)}: {error}") from None
    return [
        rounded_factors(view, svd, task.scaling, stack.dtype, f"the weight of {task.where}")
        for task, view, svd in zip(batch, views, found, strict=True)
    ]


def _without_reused(batch: list[LayerJob], emit: Emit) -> list[LayerJob]:
    """The layers of a batch that need an SVD; the others are done."""
    left = []
    for task in batch:
        if report := task.reuse_previous():
            emit(task, report)
        else:
            left.append(task)
    return left


@contextlib.contextmanager
def _or_in_halves(batch: list[LayerJob], again: Callable[[list[LayerJob]], None]) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, ValueError) as error:
        if len(batch) > 1:
            failure = None
        elif isinstance(error, ValueError):
            raise
        else:
            failure = type(error)(f"{batch[0].where}: {error}")
    else:
        return
    # outside the handler, whose traceback keeps what filled the memory
    if failure is not None:
        raise failure
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    again(batch[: len(batch) // 2])
    again(batch[len(batch) // 2 :])
