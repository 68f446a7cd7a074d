"""A weight whose blocks several processes hold, as an operator of the first one.

:mod:`pissa_kernels.svd.sharded_products` has the products, and what is transferred for them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..runtime.connected import raise_first, told
from ..runtime.shards import Shard
from .operators import Projection, ScaledOperator, needs_scale, scale_for
from .sharded_products import STOP, Blocks

# Columns of the identity that are multiplied at a time.
IDENTITY_COLUMNS = 128


@contextlib.contextmanager
def serving(shard: Shard) -> Iterator[ShardedOperator | None]:
    """Context in which the first process has the operator; the others multiply for it, and enter at its end.

    Args:
        shard: what this process holds, (rows, columns) in the orientation of the weight.

    Raises:
        ValueError, RuntimeError: of any of the processes, in all of them.
    """
    blocks = Blocks(shard.mT if shard.shape[0] < shard.shape[1] else shard)
    failure: BaseException | None = None
    try:
        if shard.over_both.is_first:
            try:
                yield ShardedOperator(blocks, shard.shape[0] < shard.shape[1])
            finally:
                blocks.request(STOP)
        else:
            blocks.serve()
            yield None
    except Exception as error:
        failure = error
    # what has failed in a block first: the method of the first process fails at the NaN that it has got from there
    tellings = shard.over_both.gather((told(blocks.failure), told(failure)))
    raise_first([each[0] for each in tellings] + [each[1] for each in tellings], blocks.failure or failure)


class ShardedOperator(ScaledOperator):
    """Products with a weight that several processes hold, in the first of them.

    Args:
        blocks: the products.
        wide: whether A is the transposed weight.

    Raises:
        ValueError: NaN or Inf in the weight.
    """

    # A·Q stays with the processes that have the rows
    gives_image = False

    def __init__(self, blocks: Blocks, wide: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.wide = wide
        self.device = blocks.device
        self.scale = 1.0
        self.energy = float(blocks.request("sum_of_squares", 1.0))
        if math.isnan(self.energy):
            raise ValueError("the weight holds NaN")
        if needs_scale(self.energy):
            self._rescale()

    def _rescale(self) -> None:
        largest = float(self.blocks.request("largest"))
        if math.isinf(largest):
            raise ValueError("the weight holds Inf")
        if largest:
            self.scale = scale_for(largest, math.prod(self.shape))
            self.energy = float(self.blocks.request("sum_of_squares", self.scale))

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shard.shape

    def apply(self, X: Tensor) -> Tensor:
        self.passes += 1
        return self.blocks.request("apply", panel=self._scaled(X))

    def adjoint(self, Y: Tensor) -> Tensor:
        self.passes += 1
        return self.blocks.request("adjoint", panel=self._scaled(Y))

    def normal(self, X: Tensor, pieces: int = 3) -> Tensor:
        if self.scale != 1.0:  # between the two products as well: the first one may overflow without it
            return self.adjoint(self.apply(X))
        self.passes += 2
        return self.blocks.request("normal", pieces, X)

    def project(self, Q: Tensor) -> Projection:
        if self.scale != 1.0:
            AQ = self.apply(Q)
            return Projection(AQ.mT @ AQ, self.adjoint(AQ), None)
        self.passes += 2
        found = self.blocks.request("project", 3, Q)
        return Projection(found[len(Q) :], found[: len(Q)], None)

    def compress(self, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        self.passes += 1
        return self.blocks.request("compress", panel=self._scaled(Q)), None

    def gram(self, dtype: torch.dtype) -> Tensor:
        self._check()
        if self.blocks.shard.over_columns:
            slabs = [self._identity(part, dtype) for part in self._parts()]
            total = torch.cat([self.normal(slab) for slab in slabs], dim=1)
            return (total + total.mT) / 2
        self.passes += 2
        return self.blocks.request("gram", self.scale, dtype=dtype)

    def dense(self) -> Tensor:
        self._check()
        return torch.cat([self.apply(self._identity(part, torch.float32)) for part in self._parts()], dim=1)

    def _check(self) -> None:
        """Go on to a method that forms a matrix only if no process has failed."""
        if int(self.blocks.request("failures")):
            raise RuntimeError("a process has failed")  # which tells its own error

    def _parts(self) -> list[range]:
        n = self.shape[1]
        return [range(first, min(first + IDENTITY_COLUMNS, n)) for first in range(0, n, IDENTITY_COLUMNS)]

    def _identity(self, part: range, dtype: torch.dtype) -> Tensor:
        """Some columns of the identity."""
        columns = torch.zeros(self.shape[1], len(part), dtype=dtype, device=self.device)
        columns[part.start : part.stop].fill_diagonal_(1.0)
        return columns
