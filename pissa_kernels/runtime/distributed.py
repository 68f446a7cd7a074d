"""The processes of one run, as torchrun starts them. A run without torchrun is a single process."""

from __future__ import annotations

import datetime
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
# Processes wait for each other at the start until each has planned its work, and at the end for the slowest one.
START_TIMEOUT, WORK_TIMEOUT = datetime.timedelta(minutes=10), datetime.timedelta(days=7)
# Time between two looks at the parent.
_PARENT_SECONDS = 0.5


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share the work, as seen by one of them.

    Attributes:
        rank: number of this process, from 0; RANK of torchrun.
        world: number of processes; WORLD_SIZE of torchrun.
        local: number of this process on its machine, which is the index of its GPU; LOCAL_RANK of torchrun.
        group: torch.distributed's group of all processes; None for a single process.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process does the work that is done once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of the processes. Returns once every process has called it."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context that fails in every process if it fails in one.

        Raises:
            RuntimeError: in the processes that did not fail, with the error of the first that did.
        """
        try:
            yield
        except Exception as error:
            self.gather(str(error) or type(error).__name__)
            raise
        for process, failure in enumerate(self.gather("")):
            if failure:
                raise RuntimeError(f"process {process}: {failure}")

    def on_several_hosts(self) -> bool:
        """Whether the processes run on more than one machine."""
        return len(set(self.gather(socket.gethostname()))) > 1


@contextmanager
def joined() -> Iterator[ProcessGroup]:
    """Context in which the processes of this run are connected through gloo."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ProcessGroup()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=START_TIMEOUT)
    ended = _end_with_parent()
    try:
        group = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT)
        yield ProcessGroup(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")), group)
    finally:
        ended.set()
        dist.destroy_process_group()


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
