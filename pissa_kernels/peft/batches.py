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
from ..runtime.transfer import Carrier
from ..svd.driver import truncated_svd_stack
from .layer import Task

Emit = Callable[[Task, LayerReport], None]
# Stacks of streamed weights that exist at once: one arrives, one is computed on, one leaves.
IN_FLIGHT = 3


def plan_waves(tasks: Sequence[Task], device: torch.device, budget: int) -> list[list[Task]]:
    """Layers that can share a stack, no more than fit the budget, in the order of their first.

    Args:
        tasks: layers whose work is done on ``device``.
        device: where.
        budget: bytes on it, for a wave's stack and its workspace.
    """
    kinds: dict[tuple[object, ...], list[Task]] = defaultdict(list)
    for task in tasks:
        weight = task.weight
        key = (weight.device, weight.shape, weight.dtype, task.transposed, task.rank, task.init, task.seed)
        kinds[key].append(task)
    waves = []
    for alike in kinds.values():
        first = alike[0]
        stacks = 1 if first.weight.device == device else IN_FLIGHT
        most = max(1, budget // (first.workspace(device) + stacks * first.weight.nbytes))
        count = -(-len(alike) // most)
        waves += [alike[index * len(alike) // count : (index + 1) * len(alike) // count] for index in range(count)]
    return waves


def in_waves(waves: Sequence[list[Task]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Carry out waves one after another, or until ``stop``.

    A wave that runs out of memory, or holds a weight that is refused, is halved until the layer is alone that cannot be
    done; its error names it.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for wave in waves:
            if wave[0].weight.device == device and not stop.is_set():
                _resident(wave, emit)
        moved = [_unsettled(wave, emit) for wave in waves if wave[0].weight.device != device]
        _streamed([wave for wave in moved if wave], device, emit, stop)


def _resident(wave: list[Task], emit: Emit) -> None:
    began = time.perf_counter()
    with _or_in_halves(wave, lambda half: _resident(half, emit)):
        wave = _unsettled(wave, emit)
        if wave:
            found = _factors(wave, torch.stack([task.weight for task in wave]))
            share = (time.perf_counter() - began) / len(wave)
            for task, factors in zip(wave, found, strict=True):
                emit(task, task.write(factors, time.perf_counter() - share))


def _streamed(waves: Sequence[list[Task]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Each wave is computed on while the next one arrives and the residuals of the last one leave."""
    if not waves:
        return
    bring, take = Carrier(device).bring, Carrier(device).take

    def alone(wave: list[Task]) -> None:
        apart = Carrier(device)  # the others are under way with their neighbours
        with _or_in_halves(wave, alone):
            wave = _unsettled(wave, emit)
            if not wave:
                return
            began = time.perf_counter()
            stack = apart.bring([task.weight for task in wave])
            found = _subtracted(wave, stack)
            _leave(wave, found, (time.perf_counter() - began) / len(wave), apart.take(stack), emit)

    with ThreadPoolExecutor(1) as pool:
        leaving: list[Future[None]] = []
        for wave, arrival in _arrivals(waves, bring):
            if stop.is_set():
                break
            began = time.perf_counter()
            try:
                stack = arrival.result()
                found = _subtracted(wave, stack)
            except (torch.OutOfMemoryError, ValueError):
                alone(wave)
                continue
            while leaving:
                leaving.pop().result()
            share = (time.perf_counter() - began) / len(wave)
            leaving.append(pool.submit(_leave, wave, found, share, take(stack), emit))
            del stack
        while leaving:
            leaving.pop().result()


def _arrivals(
    waves: Sequence[list[Task]], bring: Callable[[list[Tensor]], Tensor]
) -> Iterator[tuple[list[Task], Future[Tensor]]]:
    """Each wave with its stack, while the next one is on its way."""
    with ThreadPoolExecutor(1) as pool:
        coming: list[Future[Tensor]] = []
        for index in range(len(waves) + 1):
            if coming:
                wait(coming)
            arrived = coming
            coming = [pool.submit(bring, [task.weight for task in wave]) for wave in waves[index : index + 1]]
            if arrived:
                yield waves[index - 1], arrived.pop()


def _subtracted(wave: list[Task], stack: Tensor) -> list[Factors]:
    """The factors of every weight in the stack, which holds the residuals afterwards."""
    found = _factors(wave, stack)
    with exact_arithmetic(stack.device):
        for task, weight, factors in zip(wave, stack, found, strict=True):
            ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, task.scaling, task.transposed)
    if stack.is_cuda:
        torch.cuda.current_stream(stack.device).synchronize()  # the stack goes to a thread of its own stream
    return found


def _leave(wave: list[Task], found: list[Factors], share: float, residuals: Iterator[Tensor], emit: Emit) -> None:
    for task, factors, residual in zip(wave, found, residuals, strict=True):
        emit(task, task.write(factors, time.perf_counter() - share, residual=residual))


def _factors(wave: list[Task], stack: Tensor) -> list[Factors]:
    first = wave[0]
    views = stack.mT if first.transposed else stack
    try:
        found = truncated_svd_stack(
            views, first.rank, tol=tolerance(stack.dtype), niter=parse_init(first.init), seed=first.seed
        )
    except ValueError as error:  # which of them it is shows when the wave has been halved
        raise ValueError(f"the weight of {first.where} {tuple(first.weight.shape)}: {error}") from None
    return [
        rounded_factors(view, svd, task.scaling, stack.dtype, f"the weight of {task.where}")
        for task, view, svd in zip(wave, views, found, strict=True)
    ]


def _unsettled(wave: list[Task], emit: Emit) -> list[Task]:
    """The layers of a wave that need an SVD; the others are done."""
    left = []
    for task in wave:
        if report := task.settled():
            emit(task, report)
        else:
            left.append(task)
    return left


@contextlib.contextmanager
def _or_in_halves(wave: list[Task], again: Callable[[list[Task]], None]) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, ValueError) as error:
        if len(wave) > 1:
            failure = None
        elif isinstance(error, ValueError):
            raise
        else:
            failure = type(error)(f"{wave[0].where}: {error}")
    else:
        return
    # outside the handler, whose traceback keeps what filled the memory
    if failure is not None:
        raise failure
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    again(wave[: len(wave) // 2])
    again(wave[len(wave) // 2 :])
