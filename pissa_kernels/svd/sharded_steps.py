"""The fixed schedule for weights that several processes hold in blocks.

All processes take the same steps at the same time. A panel (n, k) is whole in each of them. Of a panel (m, k), which a
product A·X has left, each has the rows of its block. So AᵀY is summed over all processes, a Gram matrix of A·X over
those that have other rows, and A·X over those that have other columns. Process 0 decides which weights need further
steps, and its triplets are those that count, so that the other processes need not find the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import batched_reference, dispatch
from ..ops.batched import Panel, Update, Weights
from ..runtime.connected import raise_first, told
from ..runtime.shards import Index, Shard
from . import fixed
from .solution import Solution
from .steps import Steps


@dataclass(frozen=True, eq=False)
class ShardedWeights:
    """What a process has of weights of one shape that are divided alike.

    Attributes:
        local: the blocks.
        shard: where the first one lies in its matrix.
        is_transposed: whether these are the transposed weights of the steps.
    """

    local: Weights
    shard: Shard
    is_transposed: bool = False

    @property
    def mT(self) -> ShardedWeights:
        """The transposed weights, as views."""
        return ShardedWeights(self.local.mT, self.shard.mT, not self.is_transposed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, m, n) of the whole weights."""
        m, n = self.shard.shape
        return len(self.local.tensors), m, n

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.local.tensors

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device


class ShardedBody:
    """The operations of :mod:`pissa_kernels.ops.batched`, with products and sums of squares of sharded weights.

    Args:
        body: the operations on what this process has.

    Attributes:
        failure: what has failed in this process. It goes on with NaN, so that the others do not wait for it.
    """

    def __init__(self, body: Any) -> None:
        self._body = body
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

    def product(
        self,
        left: ShardedWeights | Panel | Tensor,
        right: Panel | Tensor,
        *,
        precision: int,
        update: Update | None = None,
        values: bool = True,
        pieces: int = 0,
    ) -> Panel:
        """left·right, see :func:`pissa_kernels.ops.batched_reference.product`."""
        if not isinstance(left, ShardedWeights):
            found: Panel = self._body.product(
                left, right, precision=precision, update=update, values=values, pieces=pieces
            )
            return found
        shard, panel = left.shard, right if isinstance(right, Panel) else Panel(right, None)
        batch, rows, k = len(left.tensors), shard.block.shape[0], panel.shape[2]
        part = panel
        if panel.shape[1] != shard.block.shape[1]:
            part = _rows(panel, shard.columns)

        def multiply() -> Tensor:
            product: Panel = self._body.product(left.local, part, precision=precision)
            return product.full

        product = self._computed((batch, rows, k), left, torch.float32, multiply)
        if not left.is_transposed:  # A·X
            product = shard.over_columns.sum_(product)
        else:
            product = shard.over_both.sum_(_placed(product, shard.rows, shard.shape[0]))
        return batched_reference.finished(product, update=update, values=values, pieces=pieces)

    def sum_of_squares(self, weights: ShardedWeights) -> Tensor:
        """‖W‖_F² of each weight (batch,) float64."""
        shape = (len(weights.tensors),)
        found = self._computed(shape, weights, torch.float64, lambda: self._body.sum_of_squares(weights.local))
        return weights.shard.over_both.sum_(found)

    def _computed(
        self, shape: tuple[int, ...], weights: ShardedWeights, dtype: torch.dtype, compute: Callable[[], Tensor]
    ) -> Tensor:
        if not weights.shard.block.numel():
            return torch.zeros(shape, dtype=dtype, device=weights.device)
        try:
            if self.failure is None:
                return compute().contiguous()
        except Exception as error:
            self.failure = error
        return torch.full(shape, torch.nan, dtype=dtype, device=weights.device)


class ShardedSteps(Steps):
    """The steps of the schedule for one batch of sharded weights."""

    weights: ShardedWeights

    def body_of(self, weights: Any) -> ShardedBody:
        return ShardedBody(dispatch.bodies(weights.local))

    def part(self, members: list[int]) -> ShardedSteps:
        tensors = [self.weights.tensors[member] for member in members]
        steps = ShardedSteps(ShardedWeights(Weights.of(tensors), self.weights.shard), self.rank, self.passes)
        steps.body = self.body  # which knows what has failed
        return steps

    def gram_of_image(self, Z: Panel) -> Tensor:
        return self.weights.shard.over_rows.sum_(self._gram(Z).contiguous())

    def whole_image(self, Z: Panel) -> Tensor:
        shard = self.weights.shard
        return shard.over_rows.sum_(_placed(Z.full, shard.rows, shard.shape[0]))

    def decided(self, figures: Tensor) -> Tensor:
        return self.weights.shard.over_both.broadcast_(figures.contiguous())


def solve(shards: Sequence[Shard], rank: int, *, tol: float, seed: int) -> Solution:
    """The leading triplets of each tall weight of a batch. All processes that hold the weights call this.

    Args:
        shards: of weights (m, n), m ≥ n, of one shape, dtype and layout, divided alike; at least one.
        rank, tol, seed: as for :func:`pissa_kernels.svd.fixed.solve`.

    Returns:
        The triplets; those of process 0 count. The figures are the same in all processes.

    Raises:
        RuntimeError: a process has failed; in all processes.
    """
    first = shards[0]
    plan = fixed.schedule(first.shape[1], rank)
    assert plan is not None
    steps = ShardedSteps(ShardedWeights(Weights.of([shard.block for shard in shards]), first), rank)
    solution = fixed.follow(steps, plan, tol, seed)
    raise_first(first.over_both.gather(told(steps.body.failure)), steps.body.failure)
    return solution


def _rows(panel: Panel, places: Index) -> Panel:
    """Some rows of a panel."""
    return Panel(
        None if panel.values is None else panel.values[:, places].contiguous(),
        None if panel.pieces is None else panel.pieces[:, :, places].contiguous(),
    )


def _placed(values: Tensor, places: Index, length: int) -> Tensor:
    """Values (batch, rows, k) in their places among ``length`` rows, with zeros elsewhere."""
    if values.shape[1] == length and isinstance(places, slice):
        return values.contiguous()
    total = values.new_zeros(len(values), length, values.shape[2])
    total[:, places] = values
    return total
