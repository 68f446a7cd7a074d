"""Copies of weights between CPU and GPU memory through pinned buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class PinnedTransfer:
    """Copies stacks of tensors of equal shape to a GPU and back, one stack at a time.

    A copy from pageable memory goes through a staging buffer of the driver and blocks. Here the CPU fills or empties
    one of two pinned buffers while the other is copied on a separate stream.

    Args:
        device: the GPU. For any other device the copies are plain ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []
        self._copied = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []  # type: ignore[no-untyped-call]

    def to_device(self, weights: Sequence[Tensor]) -> Tensor:
        """Copy weights (m, n) into a stack (batch, m, n) on the device. Returns when the copy is complete."""
        with self._on_stream():
            stack = weights[0].new_empty((len(weights), *weights[0].shape), device=self.device)
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
        """Yield each tensor of a stack in a pinned buffer, valid until the next tensor is requested."""
        with self._on_stream():
            for index in range(min(2, len(stack))):
                self._send(index, stack)
            for index in range(len(stack)):
                if self.on_gpu:
                    self._copied[index % 2].synchronize()
                yield self._buffers[index % 2]
                if index + 2 < len(stack):
                    self._send(index + 2, stack)

    def _send(self, index: int, stack: Tensor) -> None:
        self._buffer(index, stack[index]).copy_(stack[index], non_blocking=True)
        self._record(index)

    def _buffer(self, index: int, like: Tensor) -> Tensor:
        if len(self._buffers) < 2 or (self._buffers[0].shape, self._buffers[0].dtype) != (like.shape, like.dtype):
            self._finish()
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
