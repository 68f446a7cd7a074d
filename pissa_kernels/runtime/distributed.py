"""The processes of one run, as torchrun starts them. A run without torchrun is a single process."""

from __future__ import annotations

import datetime
import os
import socket
import threading
from collections.abc import Iterator, Sequence
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
    def is_connected(self) -> bool:
        """Whether there is a process group, which may be of one process."""
        import torch.distributed as dist

        return dist.is_available() and dist.is_initialized()

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

    def share(self, value: T) -> T:
        """The value of the first process."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        holder = [value if self.first else None]
        dist.broadcast_object_list(holder, group=self.group, group_src=0)
        return holder[0]  # type: ignore[return-value]

    def agree(self, failure: BaseException | None) -> None:
        """Fail in every process if one has failed, see :func:`raise_first`."""
        raise_first(self.gather(told(failure)), failure)

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


Told = tuple[str, str, str | None]


def told(failure: BaseException | None) -> Told | None:
    """What other processes are told of an error: its class, its message, and the layer that the message names."""
    if failure is None:
        return None
    return type(failure).__name__, str(failure) or type(failure).__name__, getattr(failure, "layer", None)


def raise_first(failures: Sequence[Told | None], own: BaseException | None) -> None:
    """Raise the first of the errors of several processes, if there is one.

    Args:
        failures: :func:`told` of each process.
        own: that of this one.

    Raises:
        TypeError, ValueError: as that process.
        RuntimeError: its message, for any other error.
    """
    for found in failures:
        if found is not None:
            kind, message, layer = found
            error: Any = {"TypeError": TypeError, "ValueError": ValueError}.get(kind, RuntimeError)(message)
            if layer is not None:  # the message names it already
                error.layer = layer
            raise error from own


def current(group: Any = None) -> ProcessGroup:
    """The processes of a group of torch.distributed that the caller has made; a single process without one.

    Args:
        group: the group; None for the default one.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return ProcessGroup()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return ProcessGroup(dist.get_rank(group), dist.get_world_size(group), local, group)


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
