"""CUDA's streams and events as an account of what they were given, without a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda", 0)


class Event:
    """A place in a stream.

    Attributes:
        stream: where it was recorded; None before that.
        position: number of entries in the stream's account before it.
        synchronized: how often a thread has waited for it.
    """

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.position = 0
        self.synchronized = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.position = stream, len(stream.account)

    def synchronize(self) -> None:
        self.synchronized += 1


class Stream:
    """A stream, with an account of what it was given: events that it waits for, and copies."""

    def __init__(self, device: Any = None, name: str = "side") -> None:
        self.name = name
        self.account: list[Any] = []

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.account.append(event)

    def synchronize(self) -> None:
        self.account.append("synchronized")


class Streams:
    """The current stream of each thread."""

    def __init__(self) -> None:
        self.default = Stream(name="default")
        self._threads = threading.local()

    def current(self, device: Any = None) -> Stream:
        return getattr(self._threads, "stream", self.default)

    @contextlib.contextmanager
    def use(self, stream: Stream | None) -> Iterator[None]:
        """What ``torch.cuda.stream`` does."""
        before = self.current()
        self._threads.stream = stream or before
        try:
            yield
        finally:
            self._threads.stream = before


class OnGpu(torch.Tensor):
    """A tensor on the CPU that reports a GPU, and what it was told about streams."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def record_stream(self, stream: Any) -> None:
        self.__dict__.setdefault("recorded", []).append(stream)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """``torch.cuda`` with streams that keep an account, and copies in the account of the current stream."""
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", streams.current)
    monkeypatch.setattr(torch.cuda, "stream", streams.use)
    copy_ = torch.Tensor.copy_

    def counted(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if non_blocking:
            streams.current().account.append("copy")
        return copy_(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **rest: empty(*size, **rest))
    return streams
