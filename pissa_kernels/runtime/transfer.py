"""Copies between CPU and GPU memory through pinned buffers, on streams of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Bytes of each of the two buffers of a HostCopy.
BUFFER_BYTES = 32 << 20


class HostCopy:
    """Copies of tensors to the CPU, made when the result is asked for, possibly by another thread.

    The copies wait for the work that the current stream of this thread has been given, and for nothing after it.

    Args:
        tensors: on one device. They are kept until the copies are complete, and must not be changed before.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [tensor.contiguous() for tensor in tensors]
        self.device = self.tensors[0].device
        self.ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def result(self) -> list[Tensor]:
        """The copies. The tensors on the device are released."""
        tensors, self.tensors = self.tensors, []
        if self.ready is None:
            return [tensor.cpu() for tensor in tensors]
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_event(self.ready)
        results = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in tensors]
        with torch.cuda.stream(stream):
            buffers = _pinned(min(BUFFER_BYTES, max(tensor.nbytes for tensor in tensors)))
            if buffers:
                _copy_through(buffers, tensors, results, stream)
            else:
                for source, target in zip(tensors, results, strict=True):
                    target.copy_(source)
        return results


def _pinned(size: int) -> list[Tensor]:
    """Two pinned buffers; none where the system has no memory that it can pin, so that copies block."""
    try:
        return [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
    except RuntimeError:
        return []


def _copy_through(
    buffers: Sequence[Tensor], tensors: Sequence[Tensor], results: Sequence[Tensor], stream: torch.cuda.Stream
) -> None:
    """Copy tensors to the CPU: the GPU fills one buffer while the CPU empties the other."""
    size = len(buffers[0])
    chunks = [
        (source[start : start + size], target[start : start + size])
        for source, target in zip(map(_bytes, tensors), map(_bytes, results), strict=True)
        for start in range(0, len(source), size)
    ]
    events: list[torch.cuda.Event] = []
    for number in range(len(chunks) + 1):
        if number < len(chunks):
            source, _ = chunks[number]
            buffers[number % 2][: len(source)].copy_(source, non_blocking=True)
            events.append(stream.record_event())
        if number:  # while the next chunk is copied
            _, target = chunks[number - 1]
            events[number - 1].synchronize()
            target.copy_(buffers[(number - 1) % 2][: len(target)])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


class PinnedTransfer:
    """Copies stacks of tensors of equal shape to a GPU and back, one stack at a time.

    A copy from pageable memory goes through a staging buffer of the driver and blocks. Here the CPU fills or empties
    one of two pinned buffers while the other is copied on a separate stream.

    Args:
        device: the GPU. For any other device the copies are plain ones. The computation is on its current stream at
            the time of construction, whatever thread copies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self.caller = torch.cuda.current_stream(device) if self.on_gpu else None
        self._buffers: list[Tensor] = []
        self._copied = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []  # type: ignore[no-untyped-call]

    def to_device(self, weights: Sequence[Tensor]) -> Tensor:
        """Copy weights (m, n) into a stack (batch, m, n) on the device. Returns when the copy is complete."""
        with self._on_stream():
            stack = weights[0].new_empty((len(weights), *weights[0].shape), device=self.device)
            if self.caller is not None:  # which computes with it: the memory is not reused before
                stack.record_stream(self.caller)
            for index, weight in enumerate(weights):
                buffer = self._buffer(index, weight)
                if self.on_gpu:
                    self._copied[index % 2].synchronize()  # the previous copy out of this buffer
                buffer.copy_(weight)
                stack[index].copy_(buffer, non_blocking=True)
                self._record(index)
            self._finish()
        return stack

    def to_host(self, stack: Tensor) -> Iterator[Tensor]:
        """Yield each tensor of a stack in a pinned buffer, valid until the next tensor is requested.

        The copies wait for the work that the stream of the computation has been given when this is called, and for
        nothing after it.
        """
        ready = None
        if self.stream is not None and self.caller is not None:
            ready = self.caller.record_event()
            stack.record_stream(self.stream)
        return self._sent(stack, ready)

    def _sent(self, stack: Tensor, ready: torch.cuda.Event | None) -> Iterator[Tensor]:
        if self.stream is not None and ready is not None:
            self.stream.wait_event(ready)
        for index in range(min(2, len(stack))):
            self._send(index, stack)
        for index in range(len(stack)):
            if self.on_gpu:
                self._copied[index % 2].synchronize()
            yield self._buffers[index % 2]
            if index + 2 < len(stack):
                self._send(index + 2, stack)

    def _send(self, index: int, stack: Tensor) -> None:
        with self._on_stream():  # not around a yield, after which another thread may end the iteration
            self._buffer(index, stack[index]).copy_(stack[index], non_blocking=True)
            self._record(index)

    def _buffer(self, index: int, like: Tensor) -> Tensor:
        if len(self._buffers) < 2 or (self._buffers[0].shape, self._buffers[0].dtype) != (like.shape, like.dtype):
            self._finish()
            self._buffers = []  # released before there are others
            self._buffers = [
                torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=self.on_gpu) for _ in range(2)
            ]
        return self._buffers[index % 2]

    def _record(self, index: int) -> None:
        if self.on_gpu:
            self._copied[index % 2].record(self.stream)

    def _finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()
