"""The seconds that the sharded layers of a model are expected to take by the fixed schedule on GPUs.

The ledger has the operations of the schedule on whole weights. In shards, each process reads and multiplies 1/P of a
weight, does all that is done with panels, and sums panels with the others; the collectives are counted by running
:mod:`pissa_kernels.svd.sharded_steps` on a stand-in. Nothing here is measured.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pissa_kernels.runtime.shards import EVERYTHING, Shard
from pissa_kernels.svd import sharded_steps

from ..ledger.models import Projections
from ..ledger.roofline import H100, Roofline
from ..ledger.run import LARGE, SMALL, initialize, ledger
from .formulas import Network, collective

# Parts of the ledger that each process does for its own block.
DIVIDED = ("products with weights", "sum_of_squares", "subtract_lowrank_")
# Collectives of a layer beside the schedule: its three factors, two fingerprints, and what is gathered as objects: the
# certificate, and three times whether a process has failed.
OF_LAYER = 3 + 2 + 4 * 2


@dataclass
class Counting:
    """In the place of :class:`pissa_kernels.runtime.mesh.Processes`: it counts, and is alone.

    Attributes:
        seen: the kind of each collective and the shape of its tensor.
        is_divided: whether there are others.
    """

    seen: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    is_divided: bool = True
    is_first: bool = True

    def __bool__(self) -> bool:
        return self.is_divided

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._counted("all_reduce", tensor)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        return self._counted("broadcast", tensor)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def _counted(self, kind: str, tensor: Tensor) -> Tensor:
        if self.is_divided:
            self.seen.append((kind, tuple(tensor.shape)))
        return tensor


@functools.cache
def collectives(wide: bool, rank: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The collectives of a batch of one weight whose rows are divided: sizes LARGE and SMALL stand for m and n.

    Args:
        wide: whether A is the transposed weight, so that its columns are divided.
        rank: r.
    """
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, SMALL, generator=generator))[0] for size in (LARGE, SMALL))
    block = ((U * torch.arange(1, SMALL + 1) ** -0.3) @ V.mT).bfloat16()
    others, none = Counting(), Counting(is_divided=False)
    rows, columns = (none, others) if wide else (others, none)
    both: Any = Counting(others.seen)
    shard = Shard(block, (LARGE, SMALL), EVERYTHING, EVERYTHING, rows, columns, both)  # type: ignore[arg-type]
    sharded_steps.solve([shard], rank, tol=1e-5, seed=0)
    return tuple(others.seen)


def collective_seconds(shape: tuple[int, int], rank: int, batch: int, network: Network) -> float:
    """Seconds of the collectives of a batch of weights (out, in) whose rows are divided."""
    m, n = max(shape), min(shape)
    named = {LARGE: m, SMALL: n}
    total = 0.0
    for kind, sizes in collectives(shape[0] < shape[1], rank):
        elements = math.prod(named.get(size, size) for size in sizes) * batch
        total += collective(kind, 4 * elements, network)
    return total


def schedule_seconds(
    model: Projections, rank: int, network: Network, batch: int, roofline: Roofline = H100
) -> dict[str, float]:
    """Seconds of all linear layers of a model, at most ``batch`` at a time, by part."""
    lines = ledger(initialize, model, rank, batch, roofline)
    divided = sum(line.seconds for part, line in lines.items() if part in DIVIDED)
    whole = sum(line.seconds for part, line in lines.items() if part not in DIVIDED)
    host = roofline.launch * sum(line.launches for line in lines.values())
    device = whole + divided / network.processes
    sums = 0.0
    for shape, count in model.shapes.items():
        for members, repeats in ((batch, count // batch), (count % batch, 1)):
            if members:
                sums += repeats * collective_seconds(shape, rank, members, network)
        sums += count * OF_LAYER * network.latency
    return {"host or device": max(host, device), "collectives": sums}
