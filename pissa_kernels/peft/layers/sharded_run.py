"""The sharded layers of a model: one after another, as all processes do, and on GPUs in batches of equal shape."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ...checks import layer_context
from ...pissa import principal_factors_of_stack
from ...report import LayerReport
from ...runtime import memory
from ...svd import fixed
from ...svd.sharded_driver import LARGEST_BATCH
from .batches import Emit
from .layer import LayerJob
from .sharded_layer import ShardedJob


def run_sharded(jobs: Sequence[LayerJob], memory_budget: int | None, done: Emit) -> None:
    """Initialize layers that several processes hold. All of these call this, with the same layers.

    Args:
        jobs: the layers.
        memory_budget: bytes beyond the model and the adapter; None for half of what is free in the fullest process.
        done: called with each layer and its report.

    Raises:
        ValueError, RuntimeError: of a layer in any process, in all of them. Layers that have not been passed to
            ``done`` are unchanged.
    """
    failure: Exception | None = None
    for batch in _batches([job for job in jobs if isinstance(job, ShardedJob)], memory_budget):
        for job, report in zip(batch, _run(batch, memory_budget), strict=True):
            failure = failure or _error_of(done, job, report)
    if failure is not None:
        raise failure


def _error_of(done: Emit, job: LayerJob, report: LayerReport) -> Exception | None:
    """What a caller's function raises, in this process alone: the others wait for it in the next layer."""
    try:
        done(job, report)
    except Exception as error:
        return error
    return None


def _batches(jobs: Sequence[ShardedJob], memory_budget: int | None) -> list[list[ShardedJob]]:
    """Layers that go through the GPU's schedule together, in the order of the first ones; the others alone."""
    kinds: dict[tuple[object, ...], list[ShardedJob]] = defaultdict(list)
    for job in jobs:
        kinds[_kind(job)].append(job)
    batches = []
    for alike in kinds.values():
        most = _most(alike[0], memory_budget) if len(alike) > 1 else 1
        count = -(-len(alike) // most)
        batches += [alike[index * len(alike) // count : (index + 1) * len(alike) // count] for index in range(count)]
    return batches


def _kind(job: ShardedJob) -> tuple[object, ...]:
    """What the layers of a batch have in common; the layer itself where it goes alone."""
    weight, recipe = job.weight, job.recipe
    device = weight.to_local().device
    if (
        job.parts > 1
        or not fixed.runs_on(device, job.shape, recipe.rank)
        or device.type != weight.device_mesh.device_type
    ):
        return (id(job),)
    return weight.device_mesh, weight.placements, weight.shape, weight.stride(), weight.dtype, job.transposed, recipe


def _most(job: ShardedJob, memory_budget: int | None) -> int:
    """How many layers like this one fit, in the process that has the least memory."""
    device = job.weight.to_local().device
    budget = memory_budget if memory_budget is not None else memory.free(device) // 2
    m, n = max(job.shape), min(job.shape)
    smallest = min(job.held.everywhere.gather(budget))
    return max(1, min(LARGEST_BATCH, smallest // fixed.workspace(m, n, job.recipe.rank)))


def _run(batch: Sequence[ShardedJob], memory_budget: int | None) -> list[LayerReport]:
    if len(batch) == 1:
        return [batch[0].run(budget=memory_budget)]
    began = time.perf_counter()
    reports: dict[int, LayerReport] = {}
    for index, job in enumerate(batch):
        with layer_context(job.label):
            report = job.reuse_previous()
        if report is not None:
            reports[index] = report
    left = [index for index in range(len(batch)) if index not in reports]
    if left:
        first = batch[left[0]]
        stacks = [batch[index].held for index in left]
        together = replace(
            stacks[0],
            matrices=[matrix for stack in stacks for matrix in stack.matrices],
            parts=list(range(len(left))),
            total=len(left),
        )
        found = principal_factors_of_stack(
            together.mT if first.transposed else together,
            first.recipe,
            first.adapter_dtype,
            lambda part: batch[left[part]].label,
        )
        seconds = (time.perf_counter() - began) / len(left)
        for index, factors in zip(left, found, strict=True):
            with layer_context(batch[index].label):
                reports[index] = batch[index].write([factors], time.perf_counter() - seconds)
    return [reports[index] for index in range(len(batch))]
