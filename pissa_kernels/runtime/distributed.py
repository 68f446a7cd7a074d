"""The processes of one run, as torchrun starts them; a run without it is one process."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
# All ranks come together when each has made its plan; one that has finished waits for the slowest one.
JOINING, PATIENCE = datetime.timedelta(minutes=10), datetime.timedelta(days=7)


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that share the work.

    Attributes:
        rank, world: which, of how many.
        local: which of those on this machine; the index of its GPU.
        group: that they talk through; None for a single process.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank, on every rank; nobody goes on before all have come here."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stretch of work that fails on every rank if it fails on one.

        Raises:
            RuntimeError: on the ranks that did not fail, with the error of the first that did.
        """
        try:
            yield
        except Exception as error:
            self.gather(f"{error}")
            raise
        for rank, failure in enumerate(self.gather("")):
            if failure:
                raise RuntimeError(f"rank {rank}: {failure}")

    def on_several_hosts(self) -> bool:
        return len(set(self.gather(socket.gethostname()))) > 1


@contextmanager
def joined() -> Iterator[ProcessGroup]:
    """This process's ranks, connected through gloo for as long as the context is open."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ProcessGroup()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=JOINING)
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield ProcessGroup(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")), group)
    finally:
        dist.destroy_process_group()
