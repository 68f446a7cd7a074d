"""Products with a weight whose blocks several processes hold: none of them ever has the whole weight.

The first process runs the method. For each product it sends a panel to the others, each multiplies its block, and the
results are summed on the first one:

==============  ==============================================  =====================================
product         sent to each process, and summed                divided columns of A
==============  ==============================================  =====================================
A·X             (n, k), (m, k)                                  the same
Aᵀ·Y            (m, k), (n, k)                                  the same
AᵀA·X           (n, k), (n, k): A·X stays where it is           A·X (m, k) is summed among them, too
==============  ==============================================  =====================================

So what is transferred does not depend on the number of processes, nor on that of the weight's elements, but on m + n. A
process that fails while it multiplies goes on with NaN, so that no other waits for it, and tells at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import dispatch, reference
from ..runtime.connected import raise_first, told
from ..runtime.shards import Shard
from .operators import Projection, ScaledOperator, needs_scale, scale_for

STOP = "stop"
VERBS = (STOP, "failures", "sum_of_squares", "largest", "apply", "adjoint", "normal", "project", "compress", "gram")
DTYPES = (torch.float32, torch.float64)
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


class Blocks:
    """The products, as all processes compute them together. Only the first one has their results.

    Args:
        shard: of A (m, n), m ≥ n.

    Attributes:
        shard: the shard.
        device: of the panels.
        failure: what has failed in this process.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.device = shard.block.device
        self.failure: Exception | None = None
        self._bodies: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}

    def request(
        self, verb: str, argument: float = 0.0, panel: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Have all processes compute a product, in the first one.

        Args:
            verb: one of :data:`VERBS`.
            argument: of that method.
            panel: its panel, (n, k) or (m, k).
            dtype: in which to compute; that of the panel, if there is one.
        """
        columns, dtype = (0, dtype) if panel is None else (panel.shape[1], panel.dtype)
        header = [VERBS.index(verb), columns, argument, DTYPES.index(dtype)]
        self.shard.over_both.broadcast_(torch.tensor(header, dtype=torch.float64, device=self.device))
        return self._run(verb, argument, columns, dtype, panel)

    def serve(self) -> None:
        """Compute what the first process requests, until it stops."""
        header = torch.zeros(4, dtype=torch.float64, device=self.device)
        while True:
            verb, columns, argument, dtype = self.shard.over_both.broadcast_(header).tolist()
            if VERBS[int(verb)] == STOP:
                return
            self._run(VERBS[int(verb)], argument, int(columns), DTYPES[int(dtype)], None)

    def _run(self, verb: str, argument: float, columns: int, dtype: torch.dtype, panel: Tensor | None) -> Tensor:
        if verb == STOP:
            return torch.empty(0)
        m, n = self.shard.shape
        if columns:
            rows = m if verb == "adjoint" else n
            sent = torch.empty(rows, columns, dtype=dtype, device=self.device) if panel is None else panel.contiguous()
            panel = self.shard.over_both.broadcast_(sent)
        result: Tensor = getattr(self, f"_{verb}")(argument, dtype, panel)
        return result

    def _sum_of_squares(self, scale: float, dtype: torch.dtype, panel: None) -> Tensor:
        """‖scale·A‖_F² (1,) float64."""
        found = self._computed((1,), torch.float64, lambda block: _sum_of_squares(block, scale))
        return self.shard.over_both.sum_to_first_(found)

    def _failures(self, argument: float, dtype: torch.dtype, panel: None) -> Tensor:
        """Number of processes that have failed."""
        return torch.tensor(sum(self.shard.over_both.gather(self.failure is not None)), device="cpu")

    def _largest(self, argument: float, dtype: torch.dtype, panel: None) -> Tensor:
        """max |a|."""
        found = self._computed((), torch.float32, lambda block: block.abs().amax().float())
        return torch.tensor(self.shard.over_both.gather(float(found)), dtype=torch.float64, device="cpu").amax()

    def _apply(self, argument: float, dtype: torch.dtype, X: Tensor) -> Tensor:
        """A·X (m, k)."""
        product = self._product("matmul", X[self.shard.columns])
        return self._summed(product, self.shard.rows, self.shard.shape[0])

    def _adjoint(self, argument: float, dtype: torch.dtype, Y: Tensor) -> Tensor:
        """AᵀY (n, k)."""
        product = self._product("rmatmul", Y[self.shard.rows])
        return self._summed(product, self.shard.columns, self.shard.shape[1])

    def _normal(self, pieces: float, dtype: torch.dtype, X: Tensor) -> Tensor:
        """AᵀA·X (n, k)."""
        _, Z = self._both(X, int(pieces))
        return self._summed(Z, self.shard.columns, self.shard.shape[1])

    def _project(self, pieces: float, dtype: torch.dtype, X: Tensor) -> Tensor:
        """AᵀA·X and below it XᵀAᵀA·X, (n + k, k)."""
        n, k = X.shape
        Y, Z = self._both(X, int(pieces))
        total = X.new_zeros(n + k, k)
        total[:n][self.shard.columns] = Z
        total[n:] = self._squared(Y)
        return self.shard.over_both.sum_to_first_(total)

    def _compress(self, argument: float, dtype: torch.dtype, X: Tensor) -> Tensor:
        """XᵀAᵀA·X (k, k)."""
        Y = self.shard.over_columns.sum_(self._product("matmul", X[self.shard.columns]))
        return self.shard.over_both.sum_to_first_(self._squared(Y))

    def _gram(self, scale: float, dtype: torch.dtype, panel: None) -> Tensor:
        """(scale·A)ᵀ(scale·A) (n, n), where every process has all columns."""
        n = self.shard.shape[1]
        found = self._computed((n, n), dtype, lambda block: reference.gram(block, dtype, scale))
        return self.shard.over_both.sum_to_first_(found)

    def _both(self, X: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
        """The rows of A·X, and the part of AᵀA·X, that this process has."""
        if not self.shard.over_columns:
            (m, n), k = self.shard.block.shape, X.shape[1]
            both = self._computed(
                (m + n, k), X.dtype, lambda block: torch.cat(self._body("normal", X.dtype)(block, X, pieces))
            )
            return both[:m], both[m:]
        Y = self.shard.over_columns.sum_(self._product("matmul", X[self.shard.columns], pieces))
        return Y, self._product("rmatmul", Y, pieces)

    def _squared(self, Y: Tensor) -> Tensor:
        """YᵀY of the rows of A·X; zero where another process has the same rows."""
        return Y.mT @ Y if self.shard.over_columns.is_first else Y.new_zeros(Y.shape[1], Y.shape[1])

    def _product(self, verb: str, panel: Tensor, pieces: int = 3) -> Tensor:
        rows = self.shard.block.shape[0 if verb == "matmul" else 1]
        return self._computed(
            (rows, panel.shape[1]),
            panel.dtype,
            lambda block: self._body(verb, panel.dtype)(block, panel.contiguous(), pieces),
        )

    def _computed(self, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """A result of the block: zero for an empty one, and NaN after a failure."""
        block = self.shard.block
        if not block.numel():
            return torch.zeros(shape, dtype=dtype, device=self.device)
        try:
            if self.failure is None:
                return compute(block).contiguous()
        except Exception as error:
            self.failure = error
        return torch.full(shape, torch.nan, dtype=dtype, device=self.device)

    def _summed(self, product: Tensor, places: Any, length: int) -> Tensor:
        if len(product) < length or not isinstance(places, slice):
            total = product.new_zeros(length, product.shape[1])
            total[places] = product
            product = total
        return self.shard.over_both.sum_to_first_(product)

    def _body(self, verb: str, dtype: torch.dtype) -> Callable[..., Any]:
        key = verb, dtype
        if key not in self._bodies:
            self._bodies[key] = dispatch.bind(verb, self.shard.block, dtype)
        return self._bodies[key]


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


def _sum_of_squares(block: Tensor, scale: float) -> Tensor:
    return ops.sum_of_squares(block[None]) if scale == 1.0 else reference.sum_of_squares(block[None], scale)
