"""What a recorded run did, as formulas in the sizes of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

UNITS = ("bf16", "tf32", "fp32")


class Dim(NamedTuple):
    """A size: a number, or a multiple of a size of the batch.

    Attributes:
        factor: the number, or the factor.
        symbol: "batch", "m", "n", or "" for a number.
    """

    factor: int
    symbol: str = ""

    def value(self, sizes: Mapping[str, int]) -> int:
        return self.factor * sizes[self.symbol] if self.symbol else self.factor


Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor that is read or written once.

    Attributes:
        shape: its sizes; a dimension of stride 0 has size 1.
        itemsize: bytes of an element.
    """

    shape: Shape
    itemsize: int

    def bytes(self, sizes: Mapping[str, int]) -> int:
        return self.itemsize * math.prod(dim.value(sizes) for dim in self.shape)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch of stand-ins, or of real weights.

    The sizes of stand-ins are primes above all other sizes of the algorithm, so that a size that is a multiple of one
    is recognized.

    Attributes:
        batch: number of weights.
        m: rows.
        n: columns.
    """

    batch: int
    m: int
    n: int

    def named(self, size: int) -> Dim:
        """The formula of a size of a stand-in."""
        for symbol, value in (("m", self.m), ("n", self.n)):
            if size and size % value == 0:
                return Dim(size // value, symbol)
        return Dim(1, "batch") if size == self.batch else Dim(size)

    def shape(self, sizes: Sequence[int]) -> Shape:
        return tuple(self.named(size) for size in sizes)

    def operand(self, tensor: Tensor) -> Operand:
        """A tensor of the batch, read or written once."""
        sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        return Operand(self.shape(sizes), tensor.element_size())


@dataclass(frozen=True)
class Event:
    """One operation on the GPU, or one wait of the host.

    Attributes:
        part: line of the ledger.
        name: name of the operation.
        operands: tensors that are read or written.
        flops: unit, and factors whose product is the number of operations.
        launches: number of kernels.
        steps: number of steps that wait for one another, within kernels and between them.
        waits: whether the host waits for the GPU.
        transfer: whether the operands cross the bus.
    """

    part: str
    name: str
    operands: tuple[Operand, ...] = ()
    flops: tuple[tuple[str, Shape], ...] = ()
    launches: int = 1
    steps: int = 5
    waits: bool = False
    transfer: bool = False


@dataclass(frozen=True)
class Line:
    """A line of the ledger.

    Attributes:
        launches, waits: numbers of kernels, and of times that the host waits.
        bytes: bytes of the device's memory.
        transferred: bytes over the bus.
        flops: operations by unit.
        seconds: sum over the operations of the time that the roofline gives to each.
    """

    launches: float = 0.0
    waits: float = 0.0
    bytes: float = 0.0
    transferred: float = 0.0
    flops: Mapping[str, float] = field(default_factory=dict, hash=False)
    seconds: float = 0.0

    def __add__(self, other: Line) -> Line:
        flops = {unit: self.flops.get(unit, 0.0) + other.flops.get(unit, 0.0) for unit in UNITS}
        return Line(
            self.launches + other.launches,
            self.waits + other.waits,
            self.bytes + other.bytes,
            self.transferred + other.transferred,
            flops,
            self.seconds + other.seconds,
        )


def linear(
    few: Mapping[Event, int], many: Mapping[Event, int], sizes: tuple[int, int]
) -> dict[Event, tuple[float, float]]:
    """How often each event occurs in a batch of k weights, as (a, b) of a + b·k, from batches of two sizes."""
    first, second = sizes
    found = {}
    for event in {**few, **many}:
        slope = (many.get(event, 0) - few.get(event, 0)) / (second - first)
        found[event] = few.get(event, 0) - slope * first, slope
    return found
