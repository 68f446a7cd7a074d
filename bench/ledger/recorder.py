"""Records what code does on stand-ins for tensors on a GPU.

The operations of :mod:`pissa_kernels.ops.batched` are one kernel each, or as many as :mod:`.costs` says; every other
operation that torch dispatches is counted as one kernel that reads its inputs and writes its results.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pissa_kernels.ops import batched, batched_reference, dispatch

from ..kernels.cases import forced
from .costs import COSTS
from .events import Event, Shape, Sizes
from .standin import Devices, StandIn, is_gpu, to_standins, to_values

aten: Any = torch.ops.aten
# Operations that return numbers or sizes, so that the host waits.
READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.unique_dim}
# Operations that only allocate.
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
# Operations that copy a list of tensors.
GATHERED = {aten.stack, aten.cat}
# Positions of the two factors of a product.
FACTORS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1, aten.baddbmm_: 1}
OTHER, COPIES = "other operations of torch", "copies to and from the host"


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The events of the code in its context.

    Args:
        sizes: sizes of the stand-ins.

    Attributes:
        events: how often each event has occurred.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = sizes
        self.events: Counter[Event] = Counter()

    @property
    def body(self) -> SimpleNamespace:
        """What takes the place of a module with the operations on batches."""
        recorded = {name: self._recorded(name) for name in COSTS}
        return SimpleNamespace(compile_ahead=batched_reference.compile_ahead, **recorded)

    def _recorded(self, name: str) -> Callable[..., Any]:
        function = getattr(batched_reference, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            # an operation of a batch knows its weights; what torch does inside is not counted
            with torch.utils._python_dispatch._disable_current_modes():
                results = function(*_unwrapped(args), **_unwrapped(kwargs))
            results = to_standins(results)
            for event in COSTS[name](self.sizes, results, *args, **kwargs):
                self.events[event] += 1
            return results

        return call

    def on_create(self, function: Any, tensor: Tensor) -> None:
        """The GPU fills a new tensor."""
        name = function.__name__
        if not name.startswith(("empty", "new_empty")):
            self.events[Event(OTHER, name, (self.sizes.operand(tensor),))] += 1

    def on_copy(self, tensor: Tensor) -> None:
        """The host copies a tensor to the GPU."""
        self.events[Event(COPIES, "copy to the GPU", (self.sizes.operand(tensor),), launches=0, transfer=True)] += 1

    def on_read(self, tensor: Tensor) -> None:
        """The host reads a tensor of the GPU, and waits for it."""
        operand = (self.sizes.operand(tensor),)
        self.events[Event(COPIES, "read", operand, launches=0, waits=True, transfer=True)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        standins = [leaf for leaf in leaves if isinstance(leaf, StandIn)]
        created = is_gpu(kwargs.get("device"))
        if not standins and not created:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        to_host = "device" in kwargs and kwargs["device"] is not None and not created
        plain = dict(kwargs)
        if created:
            plain["device"] = torch.device("cpu")
        results = func(*to_values(args), **to_values(plain))
        if to_host or packet in READS or (packet is aten.copy_ and not isinstance(args[0], StandIn)):
            self.on_read(standins[0])
            return results if to_host or not _has_tensor(results) else to_standins(results)
        if packet is aten.copy_ and not isinstance(args[1], StandIn):
            self.on_copy(args[1])
            return args[0]
        wrapped = self._wrapped(results, leaves)
        if packet not in ALLOCATIONS and not _is_view(func, standins, wrapped):
            self.events[self._event(packet, func, args, standins, wrapped)] += 1
        return wrapped

    def _event(self, packet: Any, func: Any, args: Any, standins: list[StandIn], results: Any) -> Event:
        written = [leaf for leaf in tree_flatten(results)[0] if isinstance(leaf, StandIn)]
        # as one operand, because a list of the weights' tensors is another event for each length
        read = written if packet in GATHERED else standins
        operands = tuple(self.sizes.operand(tensor) for tensor in (*read, *written))
        flops: tuple[tuple[str, Shape], ...] = ()
        if packet in FACTORS:
            left, right = args[FACTORS[packet]], args[FACTORS[packet] + 1]
            unit = "bf16" if left.dtype in (torch.bfloat16, torch.float16) else "fp32"
            flops = ((unit, (*self.sizes.shape(left.shape), self.sizes.named(right.shape[-1]), self.sizes.named(2))),)
        return Event(OTHER, str(packet).removeprefix("aten."), operands, flops)

    def _wrapped(self, results: Any, inputs: list[Tensor]) -> Any:
        """Results as stand-ins; a result that is an input remains the same object."""
        known = {id(tensor.values): tensor for tensor in inputs if isinstance(tensor, StandIn)}
        return tree_map(lambda leaf: known[id(leaf)] if id(leaf) in known else to_standins(leaf), results)


def _is_view(func: Any, inputs: list[StandIn], results: Any) -> bool:
    """Whether an operation returns views of its inputs and writes nothing."""
    if func._schema.is_mutable:
        return False
    memory = {tensor.values.untyped_storage().data_ptr() for tensor in inputs}
    outputs = [leaf for leaf in tree_flatten(results)[0] if isinstance(leaf, StandIn)]
    return bool(outputs) and all(leaf.values.untyped_storage().data_ptr() in memory for leaf in outputs)


def _has_tensor(results: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_flatten(results)[0])


def _unwrapped(tree: Any) -> Any:
    """Tensors on the CPU in the place of stand-ins, in batches of weights too."""
    if isinstance(tree, batched.Weights):
        return batched.Weights(tuple(map(to_values, tree.tensors)), to_values(tree.addresses))
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(map(_unwrapped, tree))
    if isinstance(tree, dict):
        return {key: _unwrapped(value) for key, value in tree.items()}
    return to_values(tree)


@contextlib.contextmanager
def recording(sizes: Sizes) -> Iterator[Recording]:
    """Record the code of the block, which finds stand-ins for a GPU and plain torch for every verb."""
    recorder = Recording(sizes)
    with (
        warnings.catch_warnings(),
        forced("torch"),
        mock.patch.object(dispatch, "bodies", return_value=recorder.body),
        Devices(recorder),
        recorder,
    ):
        warnings.simplefilter("ignore")  # there is no GPU
        yield recorder
