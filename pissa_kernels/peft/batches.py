"""Layers of equal shape as one batch: on a GPU, and through a GPU for weights that are on the CPU."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..checks import layer_context
from ..numerics import exact_arithmetic
from ..ops import dispatch
from ..ops.batched import Weights
from ..pissa import Factors, principal_factors_of_batch
from ..report import LayerReport
from ..runtime.transfer import HostCopy, PinnedTransfer
from .layer import LayerJob
from .record import sampled

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
        kinds[weight.device, weight.shape, weight.stride(), weight.dtype, job.transposed, accuracy].append(job)
    batches = []
    for alike in kinds.values():
        first = alike[0]
        streamed = 0 if first.weight.device == device else IN_FLIGHT * first.weight.nbytes
        most = max(1, budget // (first.workspace(device) + streamed))
        count = -(-len(alike) // most)
        batches += [alike[index * len(alike) // count : (index + 1) * len(alike) // count] for index in range(count)]
    return batches


def run_batches(batches: Sequence[list[LayerJob]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Initialize batches one after another, until ``stop`` is set.

    A batch that runs out of memory, or has a weight that is refused, is halved until the layer that fails is alone; the
    error names it. Batches whose weights have been changed are recorded and emitted in any case.
    """
    moved = []
    with _Leaving() as leaving:
        for batch in batches:
            if stop.is_set():
                return
            if batch[0].weight.device == device:
                _in_halves(batch, lambda part: _resident(part, emit, leaving))
            else:
                moved.append(batch)
    _streamed([batch for batch in (_without_reused(batch, emit) for batch in moved) if batch], device, emit, stop)


class _Leaving:
    """A thread in which the results of one batch leave the device while the next batch is decomposed."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="pissa_kernels-leaving")
        self.last: Future[None] | None = None

    def __enter__(self) -> _Leaving:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self.pool.shutdown()

    def submit(self, work: Callable[[], None]) -> None:
        """Start ``work`` when the batch before it has left."""
        self.wait()
        self.last = self.pool.submit(work)

    def wait(self) -> None:
        """Wait for the batch that is leaving, and raise what its work has raised."""
        last, self.last = self.last, None
        if last is not None:
            last.result()


def _resident(batch: list[LayerJob], emit: Emit, leaving: _Leaving) -> None:
    """Initialize layers whose weights are on the device."""
    began = time.perf_counter()
    batch = _without_reused(batch, emit)
    if not batch:
        return
    weights = [job.weight for job in batch]
    found = principal_factors_of_batch([job.view for job in batch], [job.recipe for job in batch])
    before = torch.stack([sampled(weight) for weight in weights])
    with contextlib.ExitStack() as stack:
        for job, factors in zip(batch, found, strict=True):
            stack.enter_context(job.restored_on_failure())
            job.set_adapter(factors.lora_A, factors.lora_B)
        _subtract(batch, weights, found)
    after = torch.stack([sampled(weight) for weight in weights])
    read = HostCopy([*_stored(found, weights[0].dtype), before, after])
    seconds = (time.perf_counter() - began) / len(batch)

    def record() -> None:
        *stored, prints_before, prints_after = read.result()
        kept = _unstacked(found, *stored)
        for job, factors, first, second in zip(batch, kept, prints_before, prints_after, strict=True):
            emit(job, job.record(factors, first.clone(), second.clone(), seconds))

    leaving.submit(record)


def _streamed(batches: Sequence[list[LayerJob]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Decompose each batch while the next one arrives and the residuals of the previous one leave."""
    if not batches:
        return
    arriving, returning = PinnedTransfer(device), PinnedTransfer(device)

    def alone(batch: list[LayerJob]) -> None:
        transfer = PinnedTransfer(device)  # the buffers of the others are in use by the neighboring batches
        stack = transfer.to_device([job.weight for job in batch])
        _decomposed(batch, stack, transfer, emit)()

    with ThreadPoolExecutor(1, thread_name_prefix="pissa_kernels-arriving") as arrivals, _Leaving() as leaving:
        coming: list[Future[Tensor]] = []
        for index in range(len(batches) + 1):
            if stop.is_set():
                break
            arrived = [future.result() if not future.exception() else None for future in coming]
            coming = [
                arrivals.submit(arriving.to_device, [job.weight for job in batch])
                for batch in batches[index : index + 1]
            ]
            if not arrived:
                continue
            batch, stack, leave = batches[index - 1], arrived.pop(), None
            if stack is not None:
                with contextlib.suppress(torch.OutOfMemoryError, ValueError):  # is raised again for the layer alone
                    leave = _decomposed(batch, stack, returning, emit, leaving)
            del stack
            if leave is None:
                _in_halves(batch, alone)
            else:
                leaving.submit(leave)


def _decomposed(
    batch: list[LayerJob], stack: Tensor, transfer: PinnedTransfer, emit: Emit, leaving: _Leaving | None = None
) -> Callable[[], None]:
    """Replace the weights in ``stack`` by residuals; the function returned writes what has been found to the layers."""
    began = time.perf_counter()
    weights = list(stack)
    views = [weight.mT if job.transposed else weight for job, weight in zip(batch, weights, strict=True)]
    found = principal_factors_of_batch(views, [job.recipe for job in batch])
    _subtract(batch, weights, found)
    if leaving is not None:
        leaving.wait()  # its buffers are used again
    read, residuals = HostCopy(_stored(found, stack.dtype)), transfer.to_host(stack)
    seconds = (time.perf_counter() - began) / len(batch)

    def leave() -> None:
        kept = _unstacked(found, *read.result())
        for job, factors, residual in zip(batch, kept, residuals, strict=True):
            emit(job, job.write(factors, time.perf_counter() - seconds, residual=residual))

    return leave


def _subtract(batch: list[LayerJob], weights: list[Tensor], found: list[Factors]) -> None:
    """W −= s·B·A for every layer, in one launch where there is a kernel."""
    views = [weight.mT if job.transposed else weight for job, weight in zip(batch, weights, strict=True)]
    dtype = weights[0].dtype
    scalings = torch.tensor([job.recipe.scaling for job in batch], dtype=torch.float64)
    with exact_arithmetic(weights[0].device):
        group = Weights.of(views)
        B, A = (torch.stack([getattr(factors, name) for factors in found]).to(dtype) for name in ("lora_B", "lora_A"))
        dispatch.bodies(group).subtract_lowrank_(group, B, A, scalings)


def _stored(found: list[Factors], dtype: torch.dtype) -> list[Tensor]:
    """A, B and the singular values of a batch, A and B in the dtype that stores the adapter."""
    A = torch.stack([factors.lora_A for factors in found]).to(dtype)
    B = torch.stack([factors.lora_B for factors in found]).to(dtype)
    return [A, B, torch.stack([factors.singular_values for factors in found])]


def _unstacked(found: list[Factors], A: Tensor, B: Tensor, S: Tensor) -> list[Factors]:
    """The factors of each layer on the CPU, in memory of their own."""
    return [
        Factors(A[index].clone(), B[index].clone(), S[index].clone(), factors.certificate)
        for index, factors in enumerate(found)
    ]


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


def _in_halves(batch: list[LayerJob], work: Callable[[list[LayerJob]], None]) -> None:
    """``work`` on a batch; after a failure on each half of it.

    The retry is outside of the handler: the traceback of the failure refers to the tensors that filled the memory.
    """
    try:
        with layer_context(batch[0].label) if len(batch) == 1 else contextlib.nullcontext():
            return work(batch)
    except (torch.OutOfMemoryError, ValueError):
        if len(batch) == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _in_halves(batch[: len(batch) // 2], work)
    _in_halves(batch[len(batch) // 2 :], work)
