"""A model in pieces that is written by one process: what is in pieces, the whole values, and errors that all share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from .connected import connected
from .mesh import Processes
from .shards import is_sharded, on_mesh


def _alone(failure: BaseException | None) -> None:
    """Nobody is told of an error."""


@dataclass(frozen=True)
class Owners:
    """The processes that hold a model together, as seen by one of them; without arguments, this one alone.

    Attributes:
        first: whether this process writes.
        agree: raises in every process if one has failed, as :meth:`pissa_kernels.runtime.connected.Connected.agree`.
    """

    first: bool = True
    agree: Callable[[BaseException | None], None] = _alone


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter, also while DeepSpeed ZeRO-3 has it in partitions."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps the values of a parameter in the partitions of the processes at this moment."""
    return hasattr(parameter, "ds_id") and not parameter.numel() and math.prod(parameter.ds_shape) > 0


def owners_of(model: nn.Module) -> Owners:
    """The processes that hold a model together, under tensor parallelism, FSDP or DeepSpeed ZeRO-3.

    Those of the largest device mesh of its parameters; all, where a parameter is in pieces that are no ``DTensor``.
    Replicas, as under DDP, are not held together: each process is alone then.

    Raises:
        ValueError: device meshes of which none contains the others.
    """
    parameters: list[Any] = list(model.parameters())
    meshes = [parameter.device_mesh for parameter in parameters if is_sharded(parameter)]
    if meshes:
        largest = max(meshes, key=lambda mesh: mesh.size())
        ranks = _ranks(largest)
        for mesh in meshes:
            if not _ranks(mesh) <= ranks:
                raise ValueError(
                    f"the model is sharded over meshes of different processes ({sorted(_ranks(mesh))} and "
                    f"{sorted(ranks)}), which no one process can gather; gather it in one mesh first"
                )
        processes = Processes(largest, range(largest.ndim))
        return Owners(processes.is_first, processes.agree)
    # FSDP1 marks its modules so
    flat = any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())
    if flat or any(hasattr(parameter, "ds_id") for parameter in parameters):
        group = connected()
        return Owners() if group is None else Owners(group.first, group.agree)
    return Owners()


def _ranks(mesh: Any) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


@contextlib.contextmanager
def agreeing(owners: Owners) -> Iterator[None]:
    """Context that all processes leave together: with an error in all of them if one of them has failed.

    Raises:
        Exception: its own in a process that has failed; as for :meth:`Owners.agree` in the others.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    try:
        owners.agree(failure)
    except Exception:
        if failure is None:
            raise
    if failure is not None:
        raise failure


def gather_to_first(
    tensors: Mapping[str, Any], owners: Owners, same: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Whole tensors, of which those of a ``DTensor`` are gathered one at a time, to the CPU of the first process.

    A collective that all processes call with the same keys in the same order.

    Args:
        tensors: tensors by their keys.
        owners: result of :func:`owners_of`.
        same: by the key of a tensor that is another one again, as with tied embeddings, the key of that one.

    Returns:
        The same keys in the first process; nothing in the others.

    Raises:
        RuntimeError: a copy did not fit into the memory of the first process; in all of them.
    """
    found: dict[str, Any] = {}
    failure: Exception | None = None
    for key, tensor in tensors.items():
        if is_sharded(tensor) and same.get(key, key) != key:
            continue
        gathered = whole(tensor)
        if owners.first and failure is None:
            try:
                found[key] = gathered.cpu() if is_sharded(tensor) else gathered
            except Exception as error:  # the others wait for this process in the next collective
                failure = error
                found.clear()
        del gathered
    with agreeing(owners):
        if failure is not None:
            raise failure
    return {key: found[key if key in found else same[key]] for key in tensors} if found else {}


def whole(tensor: Any) -> Any:
    """The values of a ``DTensor``, gathered from the processes of its mesh, which all call this; others as they are."""
    if not is_sharded(tensor):
        return tensor
    found, local = tensor.detach(), on_mesh(tensor)
    if local.device != found.to_local().device:  # offloaded, while the collectives of the mesh run on its devices
        placed: dict[str, Any] = {"run_check": False, "shape": found.shape, "stride": found.stride()}
        found = type(found).from_local(local, found.device_mesh, found.placements, **placed)
    return found.full_tensor()
