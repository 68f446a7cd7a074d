"""Weights between the CPU's memory and a GPU's, through pinned buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class PinnedTransfer:
    """Moves stacks of equal tensors, one at a time.

    Copies from pageable memory go through the driver's own staging and block. Here one of two pinned buffers is filled
    or emptied by the CPU while the other is on its way, on a stream of the carrier's own.

    Args:
        device: the GPU. On any other device the copies are plain ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []
        self._moved = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []  # type: ignore[no-untyped-call]

    def to_device(self, weights: Sequence[Tensor]) -> Tensor:
        """A stack (batch, m, n) on the device. It is complete on return."""
        with self._on_stream():
            stack = weights[0].new_empty((len(weights), *weights[0].shape), device=self.device)
            for index, weight in enumerate(weights):
                buffer = self._buffer(index, weight)
                if self.on_gpu:
                    self._moved[index % 2].synchronize()  # the copy that read this buffer before
                buffer.copy_(weight)
                stack[index].copy_(buffer, non_blocking=True)
                self._record(index)
            self._finish()
        return stack

    def to_host(self, stack: Tensor) -> Iterator[Tensor]:
        """Each of a stack on the CPU, valid until the next one but one is asked for."""
        with self._on_stream():
            for index in range(min(2, len(stack))):
                self._send(index, stack)
            for index in range(len(stack)):
                if self.on_gpu:
                    self._moved[index % 2].synchronize()
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
            self._moved[index % 2].record(self.stream)

    def _finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()
