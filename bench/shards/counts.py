"""What the first process does for one weight, counted by running the code on a stand-in on the CPU.

The stand-in is small, and the plan is that of the real weight on a GPU. So the method, the block and the limit are
those of the real weight, and the number of steps is that of the stand-in.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pissa_kernels import pissa
from pissa_kernels.factors import Recipe
from pissa_kernels.runtime.mesh import Processes
from pissa_kernels.runtime.shards import EVERYTHING, Shard, ShardedStack
from pissa_kernels.svd import driver, sketches
from pissa_kernels.svd.cost import SolverPlan
from pissa_kernels.svd.sharded_products import Blocks

from ..initializers.suites import real_like
from ..kernels.cases import forced
from ..ledger.events import Event, Sizes
from ..ledger.recorder import ALLOCATIONS, FACTORS, READS

aten: Any = torch.ops.aten
# Sides of a stand-in: primes above every panel's width, so that a size that is a multiple of one is a weight's. AᵀA is
# formed where n ≤ 1024, from slabs of 128 columns: of the same number of slabs here.
SMALL, SMALL_FORMED, LARGE = 1201, 1021, 1409
# Dense problems of some hundred rows, and the operand that they are of.
EIGENPROBLEMS = {aten._linalg_eigh: "eigh", aten.linalg_eigh: "eigh", aten._linalg_svd: "svd"}
# Each column waits for the one before.
BY_COLUMNS = {aten.linalg_cholesky_ex, aten.linalg_solve_triangular, aten.linalg_qr}


class Request(NamedTuple):
    """A request of the first process, see :class:`pissa_kernels.svd.sharded_products.Blocks`.

    Attributes:
        verb: of :data:`pissa_kernels.svd.sharded.VERBS`.
        columns: of the panel; 0 without one.
        pieces: bfloat16 pieces of the panel.
    """

    verb: str
    columns: int
    pieces: int


@dataclass(frozen=True)
class Counts:
    """What is done for one weight.

    Attributes:
        requests: how often each request is made.
        messages: collectives outside of requests, by kind; their operands are tensors of sizes of the weight.
        operations: small operations of the first process, as events of the ledger.
        dense: how often an eigenproblem ("eigh") or an SVD ("svd") of so many rows is solved.
        drawn: matrices of random numbers that are drawn on the CPU.
        method: the certificate's.
    """

    requests: Counter[Request]
    messages: Counter[tuple[str, Event]]
    operations: Counter[Event]
    dense: Counter[tuple[str, int]]
    drawn: Counter[Event]
    method: str


class Alone(Processes):
    """Processes of which there is one, which counts what it would transfer.

    Args:
        others: whether there are said to be others.
        count: is told the kind of each collective and its tensor; None for Python objects.
    """

    def __init__(self, others: bool, count: Callable[[str, Tensor | None], None]) -> None:
        self.is_first, self.device, self.bytes_moved = True, "cpu", 0
        self._others, self._count = others, count

    def __bool__(self) -> bool:
        return self._others

    def _counted(self, kind: str, tensor: Tensor) -> Tensor:
        if self._others:
            self._count(kind, tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        return self._counted("broadcast", tensor)

    def sum_to_first_(self, tensor: Tensor) -> Tensor:
        return self._counted("reduce", tensor)

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._counted("all_reduce", tensor)

    def share(self, value: Any) -> Any:
        if self._others:
            self._count("share", None)
        return value

    def gather(self, value: Any) -> list[Any]:
        if self._others:
            self._count("gather", None)
        return [value]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations of the first process; those of a product with its block are left out.

    Args:
        sizes: of the stand-in.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = sizes
        self.requests: Counter[Request] = Counter()
        self.messages: Counter[tuple[str, Event]] = Counter()
        self.operations: Counter[Event] = Counter()
        self.dense: Counter[tuple[str, int]] = Counter()
        self.drawn: Counter[Event] = Counter()
        self.within = False

    def message(self, kind: str, tensor: Tensor | None) -> None:
        """Count a collective, unless it belongs to a request."""
        if not self.within:
            operands = () if tensor is None else (self.sizes.operand(tensor),)
            self.messages[kind, Event("collectives", kind, operands)] += 1

    def request(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``Blocks.request`` that is counted."""

        def call(
            blocks: Blocks, verb: str, argument: float = 0.0, panel: Tensor | None = None, **options: Any
        ) -> Tensor:
            pieces = int(argument) if verb in ("normal", "project") else 3
            self.requests[Request(verb, 0 if panel is None else panel.shape[1], pieces)] += 1
            self.within = True
            try:
                with torch.utils._python_dispatch._disable_current_modes():
                    return original(blocks, verb, argument, panel, **options)
            finally:
                self.within = False

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        read = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_flatten(made)[0] if isinstance(leaf, Tensor)]
        if packet in EIGENPROBLEMS:
            self.dense[EIGENPROBLEMS[packet], read[0].shape[-1]] += 1
        elif packet is aten.randn:
            self.drawn[Event("sketch", "randn", (self.sizes.operand(made),))] += 1
        elif packet not in ALLOCATIONS and not _is_view(func, read, written):
            self.operations[self._event(packet, args, read, written)] += 1
        return made

    def _event(self, packet: Any, args: Any, read: list[Tensor], written: list[Tensor]) -> Event:
        operands = tuple(map(self.sizes.operand, (*read, *written)))
        steps = 5
        flops: tuple[tuple[str, Any], ...] = ()
        if packet in FACTORS:
            left, right = args[FACTORS[packet]], args[FACTORS[packet] + 1]
            flops = (("fp32", (*self.sizes.shape(left.shape), *self.sizes.shape((right.shape[-1], 2)))),)
        if packet in BY_COLUMNS:
            steps = 2 * written[0].shape[-1]
        return Event("small operations", packet.__name__, operands, flops, steps=steps, waits=packet in READS)


def _is_view(func: Any, read: list[Tensor], written: list[Tensor]) -> bool:
    """Whether an operation makes views of what it reads, and writes nothing."""
    if func._schema.is_mutable:
        return False
    memory = {tensor.untyped_storage().data_ptr() for tensor in read}
    return bool(written) and all(tensor.untyped_storage().data_ptr() in memory for tensor in written)


@functools.lru_cache(maxsize=64)
def counted(plan: SolverPlan, wide: bool, square: bool, rank: int) -> Counts:
    """What the first process does for a weight (out, in) in bfloat16 whose rows are divided, as by FSDP2.

    Args:
        plan: of the real weight.
        wide: whether out < in, so that the columns of A are divided.
        square: whether out = in.
        rank: r.

    Raises:
        RuntimeError: the plan does not reach the tolerance on the stand-in.
    """
    n = SMALL_FORMED if plan.through_gram else SMALL
    m = n if square else LARGE
    shape = (n, m) if wide else (m, n)
    weight = real_like("stand-in", shape, rank).weight()
    recorder = Recorder(Sizes(1, m, n))
    over, alone = Alone(True, recorder.message), Alone(False, recorder.message)
    shard = Shard(weight, shape, slice(0, shape[0]), EVERYTHING, over, alone, over)
    stack = ShardedStack([shard], [0], 1, shape, weight.device, alone, over, alone)

    def chosen(*args: Any, exclude: Any = (), **options: Any) -> SolverPlan:
        if plan.method in exclude:
            raise RuntimeError(f"{plan.method} does not reach the tolerance on the stand-in, which gives no counts")
        return plan

    with _watched(recorder, chosen):
        (factors,) = pissa.principal_factors_of_stack(stack, Recipe(rank), weight.dtype, lambda part: "stand-in")
    certificate = factors.certificate
    if not certificate.converged:
        raise RuntimeError(f"{plan.method} does not reach the tolerance on the stand-in, which gives no counts")
    return Counts(
        recorder.requests,
        recorder.messages,
        recorder.operations,
        recorder.dense,
        recorder.drawn,
        certificate.method,
    )


@contextmanager
def _watched(recorder: Recorder, chosen: Callable[..., SolverPlan]) -> Iterator[None]:
    with (
        forced("torch"),
        mock.patch.object(driver, "choose_plan", chosen),
        mock.patch.object(Blocks, "request", recorder.request(Blocks.request)),
        mock.patch.object(sketches, "_recently_drawn", sketches._drawn),
        recorder,
    ):
        yield
