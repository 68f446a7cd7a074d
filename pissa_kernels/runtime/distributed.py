"""The processes of one run, as torchrun starts them. A run without torchrun is a single process."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from .contact import Contact, ProcessLost

T = TypeVar("T")
# Time between two looks at the parent.
_PARENT_SECONDS = 0.5


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share the work, as seen by one of them.

    Attributes:
        rank: number of this process, from 0; RANK of torchrun.
        world: number of processes; WORLD_SIZE of torchrun.
        local: number of this process on its machine, which is the index of its GPU; LOCAL_RANK of torchrun.
        contact: with the other processes; None for a single process.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    contact: Contact | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def first(self) -> bool:
        """Whether this process does the work that is done once."""
        return self.rank == 0

    def check(self) -> None:
        """Return if every process is there, so that this one may write.

        Raises:
            ProcessLost: one is lost, or the others have given up this one. The message names it.
        """
        if self.contact is not None:
            self.contact.check()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, of JSON types, in their order. Returns once every process has called it.

        Raises:
            ProcessLost: as for :meth:`check`.
        """
        return [value] if self.contact is None else self.contact.gather(value)

    def claim(self) -> int:
        """The next number, from 0, that no process has taken."""
        return next(self._numbers) if self.contact is None else self.contact.claim()

    def taken_elsewhere(self) -> int:
        """In process 0, how many numbers others have taken since the last call; 0 elsewhere."""
        return 0 if self.contact is None else self.contact.taken_elsewhere()

    def close_claims(self) -> None:
        """Let no process take a number any more."""
        if self.contact is not None:
            self.contact.close_claims()

    def tell(self, doing: list[str]) -> None:
        """Tell the others what this process has in work, for their message if it is lost."""
        if self.contact is not None:
            self.contact.doing = doing

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context that fails in every process if it fails in one.

        Raises:
            RuntimeError: in the processes that did not fail, with the error of the first that did.
        """
        try:
            yield
        except ProcessLost:
            raise  # nobody would answer
        except Exception as error:
            with contextlib.suppress(ProcessLost):
                self.gather(str(error) or type(error).__name__)
                self._agree()
            raise
        for process, failure in enumerate(self.gather("")):
            if failure:
                self._agree()
                raise RuntimeError(f"process {process}: {failure}")

    def _agree(self) -> None:
        if self.contact is not None:
            self.contact.agreed = True

    def hosts(self) -> list[str]:
        """Names of the machines that the processes run on, each once."""
        return sorted(set(self.gather(socket.gethostname())))


@contextmanager
def joined() -> Iterator[ProcessGroup]:
    """Context in which the processes of this run are in contact.

    Raises:
        RuntimeError: not all have come.
        ProcessLost: in any method of the group, and in the context after SIGTERM.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ProcessGroup()
        return
    from .meeting import meet

    rank = int(os.environ["RANK"])
    ended = _end_with_parent()
    try:
        contact = Contact(rank, *meet(rank, world))
        with _sigterm_told_to(contact):
            try:
                yield ProcessGroup(rank, world, int(os.environ.get("LOCAL_RANK", "0")), contact)
            except BaseException as error:
                contact.leave(error)
                raise
            contact.leave(None)
    finally:
        ended.set()


@contextmanager
def _sigterm_told_to(contact: Contact) -> Iterator[None]:
    """Context in which SIGTERM is told to the other processes, if nobody else handles it.

    torchrun sends it to all processes of its host when one of them is killed.
    """
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, lambda *_: contact.ask_to_end())
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_parent() -> threading.Event:
    """End this process within a second of its parent, until the event that is returned is set.

    A torchrun that is killed cannot end its processes, which would go on writing while the next run starts.
    """
    parent, ended = os.getppid(), threading.Event()

    def watch() -> None:
        while not ended.wait(_PARENT_SECONDS):
            if os.getppid() != parent:
                os._exit(1)  # as if it were killed too: a run can be resumed after that

    threading.Thread(target=watch, daemon=True, name="pissa_kernels-parent").start()
    return ended
