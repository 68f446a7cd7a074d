"""Copies between CPU and GPU: on which streams, after what, and what they keep. The GPU is an account."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch

from pissa_kernels.runtime import transfer
from pissa_kernels.runtime.transfer import HostCopy, PinnedTransfer

from ..support.streams import DEVICE, Event, OnGpu, Stream, Streams

CPU = torch.device("cpu")


def in_a_thread(work: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def tensors() -> list[torch.Tensor]:
    return [torch.randn(3, 50), torch.randn(40, 7).mT, torch.arange(5), torch.randn(2, 3).bfloat16()]


def test_copies_of_tensors_on_the_cpu_and_their_release() -> None:
    given = tensors()
    expected = [tensor.clone() for tensor in given]
    copied = HostCopy(given)
    large = weakref.ref(copied.tensors[1])  # contiguous, so a copy already
    found = copied.result()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    del found
    assert large() is None


@pytest.mark.parametrize("size", [64, 1 << 20])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_host_copy_waits_for_the_caller_and_for_nothing_after_it(
    pinned: bool, size: int, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks as large as a buffer, or with blocking copies where no memory can be pinned."""
    monkeypatch.setattr(transfer, "BUFFER_BYTES", size)
    made: list[Stream] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(Stream()) or made[-1])
    if not pinned:
        monkeypatch.setattr(transfer, "_pinned", lambda size: [])
    caller = Stream(name="caller")
    expected = tensors()
    with streams.use(caller):
        caller.account.append("kernel")
        copied = HostCopy([tensor.as_subclass(OnGpu) for tensor in expected])
        caller.account.append("kernel of the next batch")
    found = in_a_thread(copied.result)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not any(isinstance(tensor, OnGpu) for tensor in found)
    [side] = made
    ready = side.account[0]
    assert isinstance(ready, Event)
    assert (ready.stream, ready.position) == (caller, 1)
    assert side.account[1:] == (sum(-(-t.nbytes // min(size, 1120)) for t in expected) if pinned else 0) * ["copy"]
    assert not streams.default.account
    assert copied.tensors == []


def test_buffers_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*size: int, **rest: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", full)
    assert transfer._pinned(100) == []


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_stacks_there_and_back(count: int) -> None:
    weights = [torch.randn(6, 5).mT for _ in range(count)]
    pinned = PinnedTransfer(CPU)
    stack = pinned.to_device(weights)
    assert torch.equal(stack, torch.stack(weights))
    for _ in range(2):
        found = [tensor.clone() for tensor in pinned.to_host(stack)]
        assert all(torch.equal(one, other) for one, other in zip(found, weights, strict=True))


def test_a_stack_arrives_for_the_stream_of_the_computation(streams: Streams) -> None:
    caller = Stream(name="caller")
    with streams.use(caller):
        pinned = PinnedTransfer(DEVICE)
    weights = [torch.randn(4, 3) for _ in range(3)]
    like = weights[0].as_subclass(OnGpu)
    like.new_empty = lambda size, device: torch.empty(size).as_subclass(OnGpu)  # type: ignore[method-assign]
    stack = in_a_thread(lambda: pinned.to_device([like, *weights[1:]]))
    assert stack.recorded == [caller], "its memory is not reused before the caller's work with it is done"
    assert pinned.stream.account == [*(3 * ["copy"]), "synchronized"] or pinned.stream.account == [
        "synchronized",  # when the buffers were made
        *(3 * ["copy"]),
        "synchronized",
    ]
    assert not caller.account
    assert torch.equal(torch.Tensor(stack), torch.stack([torch.Tensor(like), *weights[1:]]))


def test_a_stack_leaves_after_the_work_that_it_was_given_and_no_other(streams: Streams) -> None:
    caller = Stream(name="caller")
    with streams.use(caller):
        pinned = PinnedTransfer(DEVICE)
        caller.account.append("kernel")
        stack = torch.randn(4, 2, 3).as_subclass(OnGpu)
        leaving = pinned.to_host(stack)
        caller.account.append("kernel of the next batch")
    assert pinned.stream.account == [], "what is still being copied does not wait for this batch"
    assert stack.recorded == [pinned.stream]
    seen = []

    def empty() -> None:
        for tensor in leaving:
            assert streams.current() is streams.default, "the stream of the copies is current while copying only"
            seen.append(torch.Tensor(tensor).clone())

    in_a_thread(empty)
    assert torch.equal(torch.stack(seen), torch.Tensor(stack))
    ready, *rest = [entry for entry in pinned.stream.account if entry != "synchronized"]
    assert (ready.stream, ready.position) == (caller, 1)
    assert rest == 4 * ["copy"]


def test_buffers_of_another_shape_are_gone_before_there_are_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a transfer has two buffers at any time."""
    live: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    numbers: list[int] = []
    empty = torch.empty

    def counted(*size: Any, **rest: Any) -> torch.Tensor:
        found = empty(*size, **rest)
        live.add(found)
        numbers.append(len(live))
        return found

    monkeypatch.setattr(torch, "empty", counted)
    pinned = PinnedTransfer(CPU)
    for shape in ((3, 5), (4, 2), (4, 2), (7, 7)):
        pinned.to_device([torch.randn(shape) for _ in range(3)])
    assert numbers == 3 * [1, 2]
