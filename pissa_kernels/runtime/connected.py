"""Processes that a caller has connected by ``torch.distributed``, and what they tell each other of their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Told = tuple[str, str, str | None]


@dataclass(frozen=True)
class Connected:
    """The processes of a group, as seen by one of them. All of them call each method, in the same order.

    Attributes:
        rank: number of this process in the group, from 0.
        world: number of processes.
        group: the group; None for the default one, or where there is none.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The object of process 0, pickled for the others."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        holder = [value if self.first else None]
        dist.broadcast_object_list(holder, group=self.group, group_src=0)
        return holder[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The objects of all processes, in their order."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def agree(self, failure: BaseException | None) -> None:
        """Fail in every process if one has failed, see :func:`raise_first`."""
        raise_first(self.gather(told(failure)), failure)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context that fails in every process if it fails in one, see :func:`raise_first`."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree(failure)


def connected(group: Any = None) -> Connected | None:
    """The processes of a group of ``torch.distributed``; None where nothing has initialized it.

    Args:
        group: the group; None for the default one.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    return Connected(dist.get_rank(group), dist.get_world_size(group), group)


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
