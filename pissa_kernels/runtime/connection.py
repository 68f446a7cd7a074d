"""A connection between two processes of a run: lines of JSON over TCP, and proof that the other one still receives."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# A message is some hundred bytes. A process that takes none in this time is treated as silent.
SEND_SECONDS = 5.0

Message = dict[str, Any]


def clock() -> float:
    """Seconds that go on while this process, or on Linux the whole machine, is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True)
class Member:
    """One process of a run.

    Attributes:
        rank: its number.
        host: name of its machine.
        pid: its id there.
    """

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.rank} (host {self.host}, pid {self.pid})"


@dataclass
class Connection:
    """One end of a connection. :meth:`send` may be called from any thread, the rest from one.

    Attributes:
        socket: connected.
        member: the process at the other end.
        silent: seconds for which nothing has come from there, without those in which this process was stopped.
        left: whether the other process has said that it ends.
        closed: whether the connection is broken.
        doing: the tensors that the other process has in work.
        confirmed: when the newest of our beats that has been received over there was sent, by :func:`clock`.
    """

    socket: socket.socket
    member: Member
    silent: float = 0.0
    left: bool = False
    closed: bool = False
    doing: list[str] = field(default_factory=list)
    confirmed: float = field(default_factory=clock)
    _beat: int = 0
    _seen: int = 0
    _sent: dict[int, float] = field(default_factory=dict)
    _unread: bytes = b""
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(SEND_SECONDS)

    def send(self, message: Message) -> None:
        """Send a message. The reader finds out about a broken connection."""
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def send_beat(self, doing: list[str]) -> None:
        """Send a beat, with what this process has in work."""
        self._beat += 1
        self._sent[self._beat] = clock()
        self.send({"beat": self._beat, "seen": self._seen, "doing": doing})

    def received(self) -> Iterator[Message]:
        """The messages that have come; waits for bytes if there are none. Beats are among them."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        self.closed = not data
        self.silent = 0.0
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.doing = message.get("doing", self.doing)
            if "beat" in message:
                self._seen, seen = message["beat"], message["seen"]
                self.confirmed = self._sent.get(seen, self.confirmed)
                self._sent = {beat: sent for beat, sent in self._sent.items() if beat > seen}
            yield message

    def close(self) -> None:
        self.socket.close()
