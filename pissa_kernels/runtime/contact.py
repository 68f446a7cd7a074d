"""The contact between the processes of a run: who is there, what they agree on, and who takes which work.

Process 0 is connected to every other. Each end sends a beat every second, from a thread of its own, so that a process
is heard of during an SVD or a flush. A killed process is noticed when its connection closes, and one that is paused, or
whose host has vanished, when nothing has come for :data:`LIMIT_SECONDS`. The first loss is told to all.

A process that was paused must not go on as if nothing had happened, because the others may have ended, and another run
may have begun. So :meth:`Contact.check` returns only if beats sent within :data:`LEASE` of the limit were received at
the other end; after a pause it waits for that. The others cannot have given this process up by then.
"""

from __future__ import annotations

import selectors
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .connection import Connection, Member, Message, clock

# Longest silence of a process. With the time that work is given to finish, a run ends within a minute.
LIMIT_SECONDS = 40.0
BEAT_SECONDS = 1.0
# A beat is early if what a process has in work has changed, but not more so than this.
_TELL_SECONDS = 0.1
# Part of the limit.
LEASE = 0.6
# Time in which a loss reaches the others, and in which they say that they end.
NEWS_SECONDS = 3.0
_POLL_SECONDS = 0.1


class ProcessLost(ConnectionError):
    """A process of the run is gone, and the others end. No error of the layer that is in work."""


class Contact:
    """The contact of one process with the others.

    Args:
        rank: number of this process.
        members: all processes.
        connections: in process 0 to every other, elsewhere to process 0.

    Attributes:
        doing: names of the tensors that this process has in work, in a list that is not changed; sent with every beat.
        agreed: whether all processes know that the run has failed.
    """

    def __init__(self, rank: int, members: Sequence[Member], connections: Sequence[Connection]) -> None:
        self.members, self._me = members, members[rank]
        self.doing: list[str] = []
        self.agreed = False
        self._connections = connections
        self._changed = threading.Condition()
        self._lost: str | None = None
        self._asked_to_end: float | None = None
        self._answers: dict[tuple[str, int], Any] = {}
        self._values: dict[int, dict[int, Any]] = defaultdict(dict)
        self._gathered = self._questions = self._next = self._taken = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._stay, daemon=True, name="pissa_kernels-contact")
        self._thread.start()

    def check(self) -> None:
        """Return if this process is one of the run; after a pause, once that is known.

        Raises:
            ProcessLost: a process is lost, or the others have given this one up. The message names it.
        """
        while True:
            if self._lost is not None:
                raise ProcessLost(self._lost)
            confirmed = min((end.confirmed for end in self._connections if not end.left), default=None)
            if confirmed is None or clock() - confirmed <= LEASE * LIMIT_SECONDS:
                return
            time.sleep(0.02)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, of JSON types, in the order of the processes."""
        self._gathered += 1
        number = self._gathered
        if self._me.rank == 0:
            self._add_value(number, 0, value)
        else:
            self._connections[0].send({"gather": number, "value": value})
        return list(self._answer(("gather", number)))

    def claim(self) -> int:
        """The next number that no process has taken, from 0."""
        with self._changed:
            self._questions += 1
            question = self._questions
            if self._me.rank == 0:
                self._next += 1
                return self._next - 1
        self._connections[0].send({"claim": question})
        return int(self._answer(("claim", question)))

    def taken_elsewhere(self) -> int:
        """In process 0, how many numbers others have taken since the last call."""
        with self._changed:
            count, self._taken = self._taken, 0
        return count

    def close_claims(self, last: int = 1 << 60) -> None:
        """Let every process find that all numbers are taken."""
        with self._changed:
            self._next = last
        if self._me.rank:
            self._connections[0].send({"close": last})

    def ask_to_end(self) -> None:
        """Count this process as lost, unless a loss that explains it becomes known within a second."""
        self._asked_to_end = self._asked_to_end or clock()

    def leave(self, error: BaseException | None) -> None:
        """End the contact, after an error that the others may not know."""
        if error is not None and not self.agreed and self._lost is None:
            reason = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
            self._lose(f"{self._me} {reason}", tell=True)
        for end in self._connections:
            if self._lost is not None:  # process 0 may be the lost one, and wake up
                end.send({"lost": self._lost})
            end.send({"left": True})
        patience = NEWS_SECONDS if self._lost is not None else LIMIT_SECONDS
        with self._changed:
            self._changed.wait_for(lambda: all(end.left or end.closed for end in self._connections), patience)
        self._stopping.set()
        self._thread.join(NEWS_SECONDS)
        for end in self._connections:
            end.close()

    def _answer(self, key: tuple[str, int]) -> Any:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: key in self._answers or self._lost is not None, _POLL_SECONDS)
                if key in self._answers:  # before what is lost: an answer may be that all have failed
                    return self._answers.pop(key)
            self.check()

    def _set_answer(self, key: tuple[str, int], value: Any) -> None:
        with self._changed:
            self._answers[key] = value
            self._changed.notify_all()

    def _add_value(self, number: int, rank: int, value: Any) -> None:
        """Process 0 keeps the values until it has those of all."""
        with self._changed:
            self._values[number][rank] = value
            if len(self._values[number]) < len(self.members):
                return
            found = self._values.pop(number)
        values = [found[rank] for rank in range(len(self.members))]
        for end in self._connections:
            end.send({"gathered": number, "values": values})
        self._set_answer(("gather", number), values)

    def _stay(self) -> None:
        try:
            self._exchange()
        except Exception as error:  # without beats, check() would wait forever
            self._lose(f"{self._me} has lost contact: {type(error).__name__}: {error}", tell=True)

    def _exchange(self) -> None:
        with selectors.DefaultSelector() as selector:
            for end in self._connections:
                selector.register(end.socket, selectors.EVENT_READ, end)
            last, beat, told = clock(), 0.0, self.doing
            while not self._stopping.is_set():
                for key, _ in selector.select(min(_POLL_SECONDS, BEAT_SECONDS / 2)):
                    self._receive(key.data)
                    if key.data.closed:
                        selector.unregister(key.fileobj)
                now = clock()
                self._listen_for_silence(min(now - last, BEAT_SECONDS))  # not the time that this process was stopped
                last = now
                if now - beat >= BEAT_SECONDS or (self.doing is not told and now - beat >= _TELL_SECONDS):
                    beat, told = now, self.doing
                    for end in self._connections:
                        if not end.closed:
                            end.send_beat(told)
                if self._asked_to_end is not None and now - self._asked_to_end > BEAT_SECONDS:
                    self._lose(f"{self._me} was asked to end (SIGTERM){_in_work(self.doing)}", tell=True)

    def _receive(self, end: Connection) -> None:
        for message in end.received():
            self._handle(end, message)
        if end.closed:
            if not end.left and not self._stopping.is_set():
                self._lose(f"{end.member} was killed, or its connection was cut{_in_work(end.doing)}")
            with self._changed:
                self._changed.notify_all()

    def _handle(self, end: Connection, message: Message) -> None:
        match message:
            case {"claim": question}:
                with self._changed:
                    index, self._next, self._taken = self._next, self._next + 1, self._taken + 1
                end.send({"claimed": question, "index": index})
            case {"claimed": question, "index": index}:
                self._set_answer(("claim", question), index)
            case {"close": last}:
                self.close_claims(last)
            case {"gather": number, "value": value}:
                self._add_value(number, end.member.rank, value)
            case {"gathered": number, "values": values}:
                self._set_answer(("gather", number), values)
            case {"lost": text}:
                self._lose(text)
            case {"left": _}:
                end.left = True
                if self._me.rank == 0:
                    end.send({"left": True})
                with self._changed:
                    self._changed.notify_all()

    def _listen_for_silence(self, seconds: float) -> None:
        silent = []
        for end in self._connections:
            if not (end.left or end.closed):
                end.silent += seconds
                if end.silent > LIMIT_SECONDS - BEAT_SECONDS:  # the processes of one host fall silent together
                    silent.append(end)
        if any(end.silent > LIMIT_SECONDS for end in silent):
            who = ", ".join(str(end.member) for end in silent[:3])
            more = f" and {len(silent) - 3} more processes" if len(silent) > 3 else ""
            has = "has" if len(silent) == 1 else "have"
            doing = [name for end in silent for name in end.doing]
            self._lose(
                f"{who}{more} {has} not been heard of for {LIMIT_SECONDS:.3g} s (paused, or the host or its network is "
                f"down){_in_work(doing)}"
            )

    def _lose(self, text: str, tell: bool = False) -> None:
        """Keep the first loss. Process 0 tells it to all; others only tell what process 0 cannot know."""
        with self._changed:
            if self._lost is not None:
                return
            self._lost = text
            self._changed.notify_all()
        if self._me.rank == 0 or tell:
            for end in self._connections:
                end.send({"lost": text})


def _in_work(names: Sequence[str]) -> str:
    """What a lost process was working on."""
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f", with {', '.join(names[:3])}{more} in work"
