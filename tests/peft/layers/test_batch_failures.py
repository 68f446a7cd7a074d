"""Batches that fail: each layer is initialized, recorded and emitted once, or unchanged, and memory is released."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pissa_kernels.ops import batched_reference
from pissa_kernels.peft.layers import batches
from pissa_kernels.peft.layers.layer import LayerJob
from pissa_kernels.peft.weights import record
from pissa_kernels.runtime.transfer import HostCopy, PinnedTransfer
from pissa_kernels.runtime.workers import InOrder

from ...support.jobs import CPU, Net, assert_accurate, jobs_of, on_call, run

NO_ROOM = "CUDA out of memory"
# those for which a batch is halved, and others
KINDS = [torch.OutOfMemoryError, ValueError, RuntimeError, MemoryError]
WAYS = pytest.mark.parametrize("way", ["resident", "streamed"])


@pytest.fixture
def layers() -> tuple[list[LayerJob], dict[str, torch.Tensor]]:
    """Eight layers of one shape, and copies of their weights."""
    jobs = jobs_of(Net())
    return jobs, {job.name or "": job.weight.clone() for job in jobs}


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def exhausted() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(NO_ROOM)


def in_fours(jobs: list[LayerJob]) -> list[list[LayerJob]]:
    return [jobs[:4], jobs[4:]]


def unchanged(job: LayerJob, weights: dict[str, torch.Tensor]) -> bool:
    B = job.layer.lora_B["default"].weight
    return torch.equal(job.weight, weights[job.name or ""]) and not B.any() and not record.records(job.layer)


def assert_finished_or_unchanged(
    jobs: list[LayerJob], weights: dict[str, torch.Tensor], emitted: list[LayerJob]
) -> None:
    assert len(set(emitted)) == len(emitted), "a layer is emitted twice"
    assert_accurate(emitted, weights)
    for job in jobs:
        assert (job in emitted and len(record.records(job.layer)) == 1) or unchanged(job, weights), job.name


# Memory


@WAYS
def test_the_tensors_of_a_failed_attempt_are_gone_before_the_first_half_begins(
    way: str, layers: tuple[list[LayerJob], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, weights = layers
    alive: list[weakref.ref[Any]] = []
    sizes: list[int] = []
    real = batches.principal_factors_of_batch

    def fills_the_memory(views: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(views))
        assert not [each for each in alive if each() is not None], "held by the traceback of the failure"
        if len(views) <= 2:
            return real(views, *args, **kwargs)
        panels = [torch.zeros(len(views), 48, 48) for _ in range(3)]
        alive.extend(map(weakref.ref, panels))
        if way == "streamed":  # a stack, or a view of it, which dies with it
            alive.append(weakref.ref(views if isinstance(views, torch.Tensor) else views[0]._base))
        del views
        raise exhausted()

    monkeypatch.setattr(batches, "principal_factors_of_batch", fills_the_memory)
    with without_gc():
        run([jobs], way)
    assert sizes in ([8, 4, 2, 2, 4, 2, 2], [8, 8, 4, 2, 2, 4, 2, 2])
    assert len(alive) >= 9
    assert_accurate(jobs, weights)


def test_the_stack_that_could_not_be_filled_is_gone_before_the_next_one_arrives(
    layers: tuple[list[LayerJob], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, weights = layers
    stacks: list[weakref.ref[torch.Tensor]] = []
    arrive, wait = PinnedTransfer.to_device, InOrder.wait

    def failing(self: PinnedTransfer, tensors: list[torch.Tensor]) -> torch.Tensor:
        stack = arrive(self, tensors)
        if not stacks:
            stacks.append(weakref.ref(stack))
            raise exhausted()
        return stack

    def checked(self: InOrder, most: int = 0) -> None:
        """Called before the next arrival."""
        deadline = time.perf_counter() + 1  # the other thread may still be about to drop the error
        while stacks[0]() is not None:
            assert time.perf_counter() < deadline, "held by the error of the arrival"
        wait(self, most)

    monkeypatch.setattr(PinnedTransfer, "to_device", failing)
    monkeypatch.setattr(InOrder, "wait", checked)
    with without_gc():
        run(in_fours(jobs), "streamed")
    assert_accurate(jobs, weights)


def test_at_most_three_stacks_are_in_flight(
    layers: tuple[list[LayerJob], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, weights = layers
    now = peak = 0
    lock = threading.Lock()
    real = PinnedTransfer.to_device

    def gone() -> None:
        nonlocal now
        with lock:
            now -= 1

    def counted(self: PinnedTransfer, tensors: list[torch.Tensor]) -> torch.Tensor:
        nonlocal now, peak
        stack = real(self, tensors)
        weakref.finalize(stack, gone)
        with lock:
            now += 1
            peak = max(peak, now)
        return stack

    monkeypatch.setattr(PinnedTransfer, "to_device", counted)
    slow = threading.Event()
    with without_gc():
        run([[job] for job in jobs], "streamed", lambda job, report: slow.wait(0.02) and None)
    assert 2 <= peak <= batches.IN_FLIGHT
    assert now == 0
    assert_accurate(jobs, weights)


# Failures around the change


def kernels(**replaced: Any) -> SimpleNamespace:
    """Operations on batches as kernels, which change all weights of a batch or none, some of them replaced."""
    names = ("product", "split", "inverse_cholesky", "eigh", "sum_of_squares", "subtract_lowrank_")
    return SimpleNamespace(**{name: getattr(batched_reference, name) for name in names} | replaced)


@WAYS
def test_a_kernel_that_cannot_be_launched_changes_nothing(
    way: str, layers: tuple[list[LayerJob], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, weights = layers
    body = kernels(subtract_lowrank_=on_call(1, exhausted(), batched_reference.subtract_lowrank_))
    monkeypatch.setattr(batches.dispatch, "bodies", lambda group: body)
    emitted: list[LayerJob] = []
    run([jobs], way, lambda job, report: emitted.append(job))
    assert emitted == jobs
    assert_finished_or_unchanged(jobs, weights, emitted)


@pytest.mark.parametrize("number", [1, 3, 8])
def test_plain_torch_may_fail_between_two_layers_of_a_batch(
    number: int, layers: tuple[list[LayerJob], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, weights = layers
    failing = on_call(number, exhausted(), batched_reference.reference.subtract_lowrank_)
    monkeypatch.setattr(batched_reference.reference, "subtract_lowrank_", failing)
    emitted: list[LayerJob] = []
    with pytest.raises(torch.OutOfMemoryError, match=rf"^layer 'layers\.{number - 1}', weight \(48, 48\): {NO_ROOM}"):
        run([jobs], "resident", lambda job, report: emitted.append(job))
    assert emitted == jobs[: number - 1]
    assert_finished_or_unchanged(jobs, weights, emitted)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_what_is_leaving_does_not_concern_the_next_batch(
    kind: type[Exception], layers: tuple[list[LayerJob], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the next batch may have been changed by then: it must not be decomposed once more."""
    jobs, weights = layers
    monkeypatch.setattr(HostCopy, "result", on_call(1, kind("no luck"), HostCopy.result))
    emitted: list[LayerJob] = []
    with pytest.raises(kind):
        run(in_fours(jobs), "resident", lambda job, report: emitted.append(job))
    assert emitted in ([], jobs[4:])
    assert_finished_or_unchanged(jobs[4:], weights, emitted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 3, 6])
def test_an_error_while_residuals_are_written_is_raised(
    number: int, kind: type[Exception], layers: tuple[list[LayerJob], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, weights = layers
    monkeypatch.setattr(LayerJob, "write", on_call(number, kind("no luck"), LayerJob.write))
    emitted: list[LayerJob] = []
    with pytest.raises(kind, match=rf"^layer 'layers\.{number - 1}', weight"):
        run([jobs[:2], jobs[2:4], jobs[4:6], jobs[6:]], "streamed", lambda job, report: emitted.append(job))
    assert jobs[number - 1] not in emitted
    assert_finished_or_unchanged(jobs, weights, emitted)


@WAYS
def test_a_stopped_run_finishes_what_it_has_changed(way: str, layers: tuple[list[LayerJob], Any]) -> None:
    jobs, weights = layers
    emitted: list[LayerJob] = []
    stop = threading.Event()

    def emit(job: LayerJob, report: Any) -> None:
        emitted.append(job)
        stop.set()

    planned = [jobs[index : index + 1] for index in range(8)]
    if way == "resident":
        batches.run_batches(planned, CPU, emit, stop)
    else:
        batches._streamed(planned, CPU, emit, stop)
    assert emitted == jobs[: len(emitted)]
    assert 1 <= len(emitted) <= 4
    assert_finished_or_unchanged(jobs, weights, emitted)
    emitted.clear()
    batches.run_batches(planned, CPU, emit, stop)
    assert not emitted


# Layers that need no SVD


def test_reused_layers_are_emitted_once_though_their_batch_is_halved(
    layers: tuple[list[LayerJob], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, weights = layers
    run([jobs[1:3]], "resident")
    before = {job: (job.weight.clone(), job.layer.lora_A["default"].weight.clone()) for job in jobs[1:3]}
    sizes: list[int] = []
    real = batches.principal_factors_of_batch

    def small_only(views: Any, *args: Any) -> Any:
        sizes.append(len(views))
        if len(views) > 3:
            raise exhausted()
        return real(views, *args)

    monkeypatch.setattr(batches, "principal_factors_of_batch", small_only)
    emitted: list[LayerJob] = []
    run([jobs], "resident", lambda job, report: emitted.append(job))
    assert sizes == [6, 3, 3]
    assert emitted[:2] == jobs[1:3]
    assert sorted(emitted, key=jobs.index) == jobs
    assert_finished_or_unchanged(jobs, weights, emitted)
    for job, (weight, A) in before.items():
        assert torch.equal(job.weight, weight)
        assert torch.equal(job.layer.lora_A["default"].weight, A)
