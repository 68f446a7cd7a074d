"""Tensors that say they are on a GPU, and compute on the CPU.

Code under test takes the branches that it takes on a GPU. What would fail without one is replaced: factories and copies
with ``device="cuda"``, pinned memory, addresses.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

GPU = torch.device("cuda", 0)
# What torch's own code sees in the place of the GPU: a build without CUDA cannot select a CUDA device.
INSIDE = torch.device("meta")


class StandIn(Tensor):
    """A tensor on a GPU that exists on the CPU.

    Attributes:
        values: the tensor on the CPU; views share their memory.
    """

    values: Tensor  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> StandIn:
        made: StandIn = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=INSIDE,
        )
        made.values = values
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StandIn({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} on a stand-in outside of a recording")


def to_values(tree: Any) -> Any:
    """Tensors on the CPU in the place of stand-ins."""
    return tree_map(lambda leaf: leaf.values if isinstance(leaf, StandIn) else leaf, tree)


def to_standins(tree: Any) -> Any:
    """Stand-ins in the place of tensors."""
    return tree_map(
        lambda leaf: StandIn(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, StandIn) else leaf, tree
    )


def is_gpu(value: Any) -> bool:
    """Whether a value names a GPU."""
    if isinstance(value, str):
        return value.partition(":")[0] == GPU.type
    return isinstance(value, torch.device) and value.type in (GPU.type, INSIDE.type)


class Observer(Protocol):
    """Sees what the host does."""

    def on_create(self, function: Any, tensor: Tensor) -> None:
        """A function of torch makes a tensor on the GPU."""

    def on_copy(self, tensor: Tensor) -> None:
        """The host copies a tensor to the GPU."""

    def on_read(self, tensor: Tensor) -> None:
        """The host reads a tensor of the GPU."""


class Devices(TorchFunctionMode):
    """Replaces, within a recording, calls that need a GPU.

    Args:
        observer: is told what the host does.
    """

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return args[0]
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], StandIn):
            self.observer.on_read(args[0])
            return func(args[0].values)
        if func is Tensor.data_ptr and isinstance(args[0], StandIn):
            return args[0].values.data_ptr()
        if func in (Tensor.to, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if is_gpu(kwargs.get("device")):  # a factory
            kwargs.pop("device")
            if not any(isinstance(arg, StandIn) for arg in args):
                created = StandIn(func(*args, **kwargs))
                self.observer.on_create(func, created)
                return created
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        kwargs = {key: value for key, value in kwargs.items() if key not in ("non_blocking", "memory_format")}
        target = func is Tensor.cuda or any(map(is_gpu, (*rest, kwargs.get("device"))))
        if func is Tensor.to and not target and not any(isinstance(arg, StandIn) for arg in rest):
            return func(tensor, *rest, **kwargs)
        kwargs.pop("device", None)
        rest = [arg for arg in rest if not is_gpu(arg) and not isinstance(arg, bool)]
        rest = [arg.dtype if isinstance(arg, StandIn) else arg for arg in rest] if func is Tensor.to else []
        if not isinstance(tensor, StandIn):
            self.observer.on_copy(tensor)
            tensor = StandIn(tensor.clone())
        return tensor.to(*rest, **kwargs) if rest or kwargs else tensor
