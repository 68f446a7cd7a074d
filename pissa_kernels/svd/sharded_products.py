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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import dispatch, reference
from ..runtime.shards import Shard

STOP = "stop"


VERBS = (STOP, "failures", "sum_of_squares", "largest", "apply", "adjoint", "normal", "project", "compress", "gram")


DTYPES = (torch.float32, torch.float64)


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


def _sum_of_squares(block: Tensor, scale: float) -> Tensor:
    return ops.sum_of_squares(block[None]) if scale == 1.0 else reference.sum_of_squares(block[None], scale)
