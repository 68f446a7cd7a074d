"""Processes along the dimensions of a device mesh: sums, broadcasts, and what they tell each other.

The collectives run along one dimension of the mesh after another, in the groups that the mesh has already. So no group
is made, and a mesh may be a part of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from .connected import raise_first, told

T = TypeVar("T")


class Processes:
    """Processes along some dimensions of a device mesh: all coordinates there, and this process's own in the others.

    Args:
        mesh: a ``DeviceMesh``.
        dims: its dimensions; without any, this process is alone.

    Attributes:
        is_first: whether the coordinates of this process are 0 in these dimensions.
        device: the type of the devices whose tensors the groups transfer.
        bytes_moved: bytes of the tensors that this process has given to collectives, or got from them.
    """

    def __init__(self, mesh: Any, dims: Sequence[int]) -> None:
        self._groups = [mesh.get_group(dim) for dim in dims]
        self._places = [mesh.get_local_rank(dim) for dim in dims]
        self.is_first = not any(self._places)
        self.device: str = mesh.device_type
        self.bytes_moved = 0

    def __bool__(self) -> bool:
        """Whether there are others."""
        return bool(self._groups)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite a contiguous tensor by that of the first process."""
        import torch.distributed as dist

        for index, group in enumerate(self._groups):
            if not any(self._places[index + 1 :]):
                dist.broadcast(tensor, group=group, group_src=0)
                self.bytes_moved += tensor.nbytes
        return tensor

    def sum_to_first_(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor of the first process by the sum over all; those of the others are spoiled."""
        import torch.distributed as dist

        for index in reversed(range(len(self._groups))):
            if not any(self._places[index + 1 :]):
                dist.reduce(tensor, group=self._groups[index], group_dst=0)
                self.bytes_moved += tensor.nbytes
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by the sum over all processes."""
        import torch.distributed as dist

        for group in self._groups:
            dist.all_reduce(tensor, group=group)
            self.bytes_moved += tensor.nbytes
        return tensor

    def share(self, value: T) -> T:
        """The object of the first process, pickled for the others."""
        import torch.distributed as dist

        for index, group in enumerate(self._groups):
            if not any(self._places[index + 1 :]):
                holder = [value]
                dist.broadcast_object_list(holder, group=group, group_src=0)
                value = holder[0]
        return value

    def gather(self, value: T) -> list[T]:
        """The objects of all processes."""
        import torch.distributed as dist

        found = [value]
        for group in self._groups:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = [each for part in parts for each in part]
        return found

    def agree(self, failure: BaseException | None) -> None:
        """Fail in every process if one has failed, see :func:`pissa_kernels.runtime.connected.raise_first`."""
        raise_first(self.gather(told(failure)), failure)
