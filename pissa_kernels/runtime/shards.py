"""Matrices in pieces: which block of a ``DTensor`` a process holds, and what is read of it or written to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .mesh import Processes

Index = slice | Tensor
EVERYTHING = slice(None)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor or parameter is a ``DTensor``, which holds a part of the values that its shape promises."""
    return type(getattr(tensor, "data", None)).__name__ == "DTensor"


def values_of(parameter: Any) -> Tensor:
    """What a process stores of a parameter: its data, or a copy of its part of a ``DTensor``."""
    data: Tensor = parameter.detach().to_local().clone() if is_sharded(parameter) else parameter.data
    return data


def part_of(value: Tensor, parameter: Any) -> Tensor:
    """The part of a tensor, which every process has whole, that a parameter stores. Nothing is transferred."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    part: Tensor = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return part


def put_(parameter: Any, values: Tensor) -> None:
    """Let a parameter store :func:`values_of` or :func:`part_of`; the data of a ``DTensor`` cannot be replaced."""
    if is_sharded(parameter):
        parameter.detach().to_local().copy_(values)
    else:
        parameter.data = values


def on_mesh(weight: Any) -> Tensor:
    """The local tensor of a ``DTensor``, on the kind of device that its mesh is of, unlike under CPU offload."""
    local: Tensor = weight.detach().to_local()
    kind = weight.device_mesh.device_type
    return local if local.device.type == kind else local.to(kind)


def reshard(model: torch.nn.Module) -> None:
    """Give the parameters that FSDP2 has gathered for a pass back, so that the model's are those that stay."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):  # an FSDPModule, without importing it
            module.reshard()  # type: ignore[operator]


@dataclass(frozen=True, eq=False)
class Shard:
    """The block of a matrix that a process holds.

    Attributes:
        block: (rows, columns) the block, any strides; it may be empty.
        shape: (m, n) of the matrix.
        rows, columns: indices of the rows and columns of the block in the matrix.
        over_rows, over_columns: processes among which the rows and the columns are divided.
        over_both: all of these.
    """

    block: Tensor
    shape: tuple[int, int]
    rows: Index
    columns: Index
    over_rows: Processes
    over_columns: Processes
    over_both: Processes

    @property
    def mT(self) -> Shard:
        """The block of the transposed matrix, a view."""
        m, n = self.shape
        return Shard(self.block.mT, (n, m), self.columns, self.rows, self.over_columns, self.over_rows, self.over_both)

    def factors(self, A: Tensor, B: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """The part of A (r, in) and B (out, r) that changes the block, on its device.

        Args:
            A, B: factors of the matrix.
            transposed: whether the matrix is stored (in, out).
        """
        out, into = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        device = self.block.device
        return A.to(device)[:, into].contiguous(), B.to(device)[out].contiguous()


@dataclass(frozen=True, eq=False)
class ShardedStack:
    """What a process holds of a stack of P matrices.

    Attributes:
        matrices: the block of each matrix that the process has a part of.
        parts: indices of these in the stack.
        total: P.
        shape: (m, n) of each matrix.
        device: of the blocks.
        over_parts: processes among which the matrices are divided.
        everywhere: all processes of the mesh, replicas included.
        replicas: those that hold the same.
    """

    matrices: list[Shard]
    parts: list[int]
    total: int
    shape: tuple[int, int]
    device: torch.device
    over_parts: Processes
    everywhere: Processes
    replicas: Processes

    @property
    def mT(self) -> ShardedStack:
        """The stack of the transposed matrices, as views."""
        return replace(self, matrices=[matrix.mT for matrix in self.matrices], shape=self.shape[::-1])


def sharded_stack(weight: Any, local: Tensor, shape: Sequence[int] | None = None) -> ShardedStack:
    """The blocks of a stack of matrices, as its placements divide it. Nothing is transferred.

    Args:
        weight: a ``DTensor``.
        local: (…, rows, columns) its local tensor, or another one of that shape.
        shape: (m, n) or (P, m, n), in which the placements divide the same dimensions as in the weight; None for the
            weight's own.

    Raises:
        ValueError: a placement that neither divides a dimension nor replicates, such as ``Partial``.
    """
    mesh = weight.device_mesh
    shape = tuple(weight.shape if shape is None else shape)
    dims = _divided_dims(weight)
    if mesh.get_coordinate() is None:
        raise ValueError(f"this process is not one of those that hold the weight, {mesh}")
    *leading, m, n = shape
    *_, rows, columns = by_dim = [_indices(weight, length, dim, dims) for dim, length in enumerate(shape)]

    def over(*wanted: int | None) -> Processes:
        return Processes(mesh, [index for index, dim in enumerate(dims) if dim in wanted])

    last = len(shape) - 1
    over_rows, over_columns, over_both = over(last - 1), over(last), over(last - 1, last)
    stack = local if leading else local.unsqueeze(0)
    return ShardedStack(
        [Shard(block, (m, n), rows, columns, over_rows, over_columns, over_both) for block in stack],
        _listed(by_dim[0], leading[0]) if leading else [0],
        leading[0] if leading else 1,
        (m, n),
        local.device,
        over(0) if leading else over(),
        Processes(mesh, range(len(dims))),
        over(None),
    )


def taken(weight: Any, places: Tensor, local: Tensor | None = None) -> Tensor:
    """Elements of a ``DTensor``, in all processes of its mesh, which all call this: (k,) float32 on the CPU.

    Args:
        weight: the ``DTensor``.
        places: (k,) places of the elements in the whole tensor, read by rows.
        local: what this process has of another tensor that is divided like it; None for its own.
    """
    mesh, dims = weight.device_mesh, _divided_dims(weight)
    block = weight.detach().to_local() if local is None else local
    at: list[Tensor] = []
    for dim, length in reversed(list(enumerate(weight.shape))):
        at.insert(0, _positions(_indices(weight, length, dim, dims), length)[places % length])
        places = places // length
    mine = torch.stack(at).amin(0) >= 0
    found = torch.zeros(len(mine), dtype=torch.float32, device="cpu")
    if mine.any() and Processes(mesh, [index for index, dim in enumerate(dims) if dim is None]).is_first:
        found[mine] = block[tuple(each[mine].to(block.device) for each in at)].float().cpu()
    everywhere = Processes(mesh, range(len(dims)))
    return everywhere.sum_(found.to(everywhere.device)).cpu()


def _positions(index: Index, length: int) -> Tensor:
    """Where this process has each index along a dimension; −1 where it has not."""
    places = torch.full((length,), -1, device="cpu")
    held = torch.arange(length, device="cpu")[index]
    places[held] = torch.arange(len(held), device="cpu")
    return places


def _divided_dims(weight: Any) -> tuple[int | None, ...]:
    """The dimension of a ``DTensor`` that each dimension of its mesh divides; None where it replicates.

    Raises:
        ValueError: a placement that does neither, such as ``Partial``.
    """
    for placement in weight.placements:
        if not (placement.is_replicate() or hasattr(placement, "dim")):
            raise ValueError(f"the weight has the placement {placement}; redistribute it as Shard or Replicate first")
    return tuple(None if placement.is_replicate() else placement.dim % weight.ndim for placement in weight.placements)


def _indices(weight: Any, length: int, dim: int, dims: tuple[int | None, ...]) -> Index:
    """Indices along one dimension that this process holds."""
    if dim not in dims:
        return EVERYTHING
    mesh = weight.device_mesh
    return _indices_of(mesh, tuple(mesh.get_coordinate()), weight.placements, length, dim, dims)


@functools.lru_cache(maxsize=256)  # models have few shapes
def _indices_of(
    mesh: Any, coordinate: tuple[int, ...], placements: tuple[Any, ...], length: int, dim: int, dims: tuple[Any, ...]
) -> Index:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    along = [
        _along_first(placement, Shard) if of == dim else Replicate()
        for placement, of in zip(placements, dims, strict=True)
    ]
    # without a source, each process cuts its own part out of its own tensor
    places = distribute_tensor(torch.arange(length, device=mesh.device_type), mesh, along, src_data_rank=None)
    found: Tensor = places.to_local().cpu()
    first, count = (int(found[0]), len(found)) if len(found) else (0, 0)
    if torch.equal(found, torch.arange(first, first + count, device="cpu")):
        return slice(first, first + count)
    return found


def _along_first(placement: Any, plain: Any) -> Any:
    """A placement of the only dimension of a vector that divides it as ``placement`` divides its own."""
    factor = getattr(placement, "split_factor", None)
    return plain(0) if factor is None else type(placement)(0, split_factor=factor)


def _listed(index: Index, length: int) -> list[int]:
    found: list[int] = torch.arange(length, device="cpu")[index].tolist()
    return found
