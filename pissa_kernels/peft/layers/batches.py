"""Layers of equal shape as one batch: on a GPU, and through a GPU for weights that are on the CPU."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ...checks import layer_context
from ...factors import Factors
from ...numerics import exact_arithmetic
from ...ops import batched_reference, dispatch
from ...ops.batched import Weights
from ...pissa import principal_factors_of_batch
from ...report import LayerReport
from ...runtime.transfer import HostCopy, PinnedTransfer
from ...runtime.workers import InOrder
from ...svd.result import Certificate
from ..weights.record import places_on, sample_
from .layer import LayerJob

Emit = Callable[[LayerJob, LayerReport], None]
# Stacks of streamed weights that exist at once: one arrives, one is decomposed, one leaves.
IN_FLIGHT = 3
# Failures after which a batch is halved: a half needs less memory, and a refused weight is found.
HALVED = (torch.OutOfMemoryError, ValueError)


def needed_bytes(job: LayerJob, device: torch.device, batch: int = 1) -> int:
    """Bytes on ``device`` for a batch of matrices like this layer's: their workspace, and what is in flight."""
    streamed = 0 if job.weight.device == device else IN_FLIGHT * job.weight.nbytes // job.parts
    return job.workspace(device, batch) + batch * streamed


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
        sizes = range(1, len(alike) + 1)
        most = max(1, bisect_right(sizes, budget, key=functools.partial(needed_bytes, alike[0], device)))
        count = -(-len(alike) // most)
        batches += [alike[index * len(alike) // count : (index + 1) * len(alike) // count] for index in range(count)]
    return batches


def run_batches(batches: Sequence[list[LayerJob]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Initialize batches one after another, until ``stop`` is set.

    A batch that runs out of memory, or has a weight that is refused, is halved until the layer that fails is alone; the
    error names it. Layers whose weights have been changed are recorded and emitted in any case, each of them once.
    """
    moved = []
    with InOrder("leaving") as leaving:
        for batch in batches:
            if stop.is_set():
                return
            if batch[0].weight.device != device:
                moved.append(batch)
            elif batch := _without_reused(batch, emit):
                _in_halves(batch, lambda part: _resident(part, emit, leaving), leaving)
    left = [_without_reused(batch, emit) for batch in moved if not stop.is_set()]
    _streamed([batch for batch in left if batch], device, emit, stop)


def _resident(batch: list[LayerJob], emit: Emit, leaving: InOrder) -> None:
    """Initialize layers whose weights are on the device.

    After an error each layer is either initialized and will be recorded, or unchanged. So what takes memory comes
    before the first change.
    """
    began = time.perf_counter()
    weights = [job.weight for job in batch]
    found = principal_factors_of_batch(_views(batch, weights), [job.recipe for job in batch])
    (A, B, S), certificates = _stored(found, weights[0].dtype)
    del found
    places = places_on(weights[0])
    before, after = weights[0].new_empty(2, len(batch), len(places))
    sample_(before, weights, places)
    changed = 0
    try:
        for members in _launches(batch, weights):
            with contextlib.ExitStack() as stack:
                if len(batch[members]) == 1:
                    stack.enter_context(layer_context(batch[members][0].label))
                for job, lora_A, lora_B in zip(batch[members], A[members], B[members], strict=True):
                    stack.enter_context(job.restored_on_failure())
                    job.set_adapter(*job.layout.joined(lora_A.unsqueeze(0), lora_B.unsqueeze(0)))
                _subtract(batch[members], weights[members], A[members], B[members])
            changed = members.stop
            sample_(after[members], weights[members], places)
    finally:
        if changed:
            read = HostCopy([tensor[:changed] for tensor in (A, B, S, before, after)])
            seconds = (time.perf_counter() - began) / len(batch)
            leaving.submit(functools.partial(_record, batch[:changed], certificates[:changed], read, seconds, emit))


def _record(batch: list[LayerJob], certificates: list[Certificate], read: HostCopy, seconds: float, emit: Emit) -> None:
    """Record layers that have been initialized on the device, and emit them."""
    *stored, before, after = read.result()
    kept = _unstacked(stored, certificates)
    for job, factors, first, second in zip(batch, kept, before, after, strict=True):
        first, second = (elements.to(torch.float32, copy=True) for elements in (first, second))
        emit(job, job.record(job.kept([factors], job.weight.dtype), first, second, seconds, job.weight.dtype))


def _streamed(batches: Sequence[list[LayerJob]], device: torch.device, emit: Emit, stop: threading.Event) -> None:
    """Decompose each batch while the next one arrives and the residuals of the previous one leave."""
    if not batches:
        return
    arriving, returning = PinnedTransfer(device), PinnedTransfer(device)
    with ThreadPoolExecutor(1, thread_name_prefix="pissa_kernels-arriving") as arrivals, InOrder("leaving") as leaving:

        def arrival(index: int) -> Future[Tensor] | None:
            weights = [[job.weight for job in batch] for batch in batches[index : index + 1]]
            return arrivals.submit(arriving.to_device, weights[0]) if weights else None

        def alone(batch: list[LayerJob]) -> None:
            transfer = PinnedTransfer(device)  # the buffers of the others are in use by the neighboring batches
            stack = transfer.to_device([job.weight for job in batch])
            leaving.submit(_decomposed(batch, stack, transfer, emit))

        coming = arrival(0)
        for index, batch in enumerate(batches):
            assert coming is not None
            with _named(batch):
                stack = _unless_halved(coming)
            coming = None  # whose error, if it has failed, refers to its stack
            if stop.is_set():
                break
            leaving.wait(most=1)  # its stack makes room for the next one
            coming = arrival(index + 1)
            leave = None
            if stack is not None:
                with contextlib.suppress(*HALVED), _named(batch):  # is raised again for the layer alone
                    leave = _decomposed(batch, stack, returning, emit)
            del stack
            if leave is not None:
                leaving.submit(leave)
            else:
                _in_halves(batch, alone, leaving, failed=True)


def _unless_halved(arrival: Future[Tensor]) -> Tensor | None:
    """The stack that has arrived; None after a failure for which the batch is halved."""
    error = arrival.exception()
    if error is None:
        return arrival.result()
    if not isinstance(error, HALVED):
        raise error
    return None


def _decomposed(batch: list[LayerJob], stack: Tensor, transfer: PinnedTransfer, emit: Emit) -> Callable[[], None]:
    """Replace the weights in ``stack`` by residuals; the function returned writes what has been found to the layers."""
    began = time.perf_counter()
    weights = list(stack)
    found = principal_factors_of_batch(_views(batch, weights), [job.recipe for job in batch])
    stored, certificates = _stored(found, stack.dtype)
    del found
    _subtract(batch, weights, *stored[:2])
    read, residuals = HostCopy(stored), transfer.to_host(stack)
    seconds = (time.perf_counter() - began) / len(batch)

    def leave() -> None:
        kept = _unstacked(read.result(), certificates)
        for job, factors, residual in zip(batch, kept, residuals, strict=True):
            with layer_context(job.label):
                emit(job, job.write([factors], time.perf_counter() - seconds, residual=residual))

    return leave


def _launches(batch: list[LayerJob], weights: list[Tensor]) -> list[slice]:
    """The members whose weights change together: all of them by a kernel, one by one in plain torch.

    A kernel is launched or not; a loop in plain torch may fail after some of the weights.
    """
    if dispatch.bodies(Weights.of(_views(batch, weights))) is not batched_reference:
        return [slice(0, len(batch))]
    return [slice(index, index + 1) for index in range(len(batch))]


def _subtract(batch: list[LayerJob], weights: list[Tensor], A: Tensor, B: Tensor) -> None:
    """W −= s·B·A for every layer, in one launch where there is a kernel."""
    scalings = torch.tensor([job.recipe.scaling for job in batch], dtype=torch.float64, device="cpu")
    with exact_arithmetic(weights[0].device):
        group = Weights.of(_views(batch, weights))
        dispatch.bodies(group).subtract_lowrank_(group, B, A, scalings)


def _views(batch: list[LayerJob], weights: list[Tensor]) -> list[Tensor]:
    """The weights, one matrix each, as (out, in)."""
    return [job.layout.matrices(weight)[0] for job, weight in zip(batch, weights, strict=True)]


def _stored(found: list[Factors], dtype: torch.dtype) -> tuple[list[Tensor], list[Certificate]]:
    """A, B and the singular values of a batch, stacked, A and B in the dtype that stores the adapter."""
    A = torch.stack([factors.lora_A for factors in found]).to(dtype)
    B = torch.stack([factors.lora_B for factors in found]).to(dtype)
    S = torch.stack([factors.singular_values for factors in found])
    return [A, B, S], [factors.certificate for factors in found]


def _unstacked(stored: list[Tensor], certificates: list[Certificate]) -> list[Factors]:
    """The factors of each layer, on the CPU, in memory of their own."""
    return [
        Factors(A.clone(), B.clone(), S.clone(), certificate)
        for A, B, S, certificate in zip(*stored, certificates, strict=True)
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


@contextlib.contextmanager
def _named(batch: list[LayerJob]) -> Iterator[None]:
    """Context that adds the layer to an error; of several layers the first, unless they are about to be halved."""
    try:
        yield
    except Exception as error:
        if len(batch) > 1 and isinstance(error, HALVED):
            raise
        others = f" or one of the {len(batch) - 1} others in its batch" if len(batch) > 1 else ""
        with layer_context(batch[0].label + others):
            raise


def _in_halves(
    batch: list[LayerJob], work: Callable[[list[LayerJob]], None], leaving: InOrder, *, failed: bool = False
) -> None:
    """``work`` on a batch; after a failure on each half of it, unless the error names a layer.

    Args:
        batch: the layers.
        work: submits to ``leaving``.
        leaving: what other batches have submitted. Their errors are raised before ``work`` starts.
        failed: whether the batch has failed already.
    """
    leaving.wait(most=1)
    if len(batch) == 1 or not failed:
        try:
            with _named(batch):
                return work(batch)
        except HALVED as error:
            if hasattr(error, "layer"):
                raise
    # outside of the handler: the traceback of the failure refers to the tensors that filled the memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _in_halves(batch[: len(batch) // 2], work, leaving)
    _in_halves(batch[len(batch) // 2 :], work, leaving)
