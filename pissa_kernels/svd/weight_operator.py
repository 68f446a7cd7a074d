"""Products with a weight that this process holds, by the backend that :mod:`pissa_kernels.ops.dispatch` chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import dispatch, reference
from .operators import Projection, ScaledOperator, needs_scale, scale_for
from .sketches import gaussian


class WeightOperator(ScaledOperator):
    """Products with a weight.

    Args:
        weight: (rows, columns), float32, float16 or bfloat16, any strides.

    Attributes:
        weight: (m, n) the weight, or its transpose (a view) if it is wide.

    Raises:
        ValueError: NaN or Inf in the weight.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.wide = weight.shape[0] < weight.shape[1]
        self.weight = weight.mT if self.wide else weight
        self.device = weight.device
        self._bodies: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}
        self.scale = 1.0
        self.energy = float(ops.sum_of_squares(weight.unsqueeze(0)))
        if math.isnan(self.energy):
            raise ValueError("the weight holds NaN")
        if needs_scale(self.energy):
            self._rescale(weight)

    def _rescale(self, weight: Tensor) -> None:
        largest = float(weight.abs().amax())
        if math.isinf(largest):
            raise ValueError("the weight holds Inf")
        if largest:
            self.scale = scale_for(largest, weight.numel())
            self.energy = float(reference.sum_of_squares(weight.unsqueeze(0), self.scale))

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight.shape
        return m, n

    def apply(self, X: Tensor) -> Tensor:
        self.passes += 1
        result: Tensor = self._body("matmul", X)(self.weight, self._scaled(X))
        return result

    def adjoint(self, Y: Tensor) -> Tensor:
        self.passes += 1
        result: Tensor = self._body("rmatmul", Y)(self.weight, self._scaled(Y))
        return result

    def normal(self, X: Tensor, pieces: int = 3) -> Tensor:
        return self.both(X, pieces)[1]

    def filter(self, X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int) -> Tensor:
        if self.scale != 1.0:
            return super().filter(X, HX, edge, degree, pieces)
        self.passes += 2 * (degree - 1)
        result: Tensor = self._body("chebyshev_filter", X)(self.weight, X, HX, edge, degree, pieces)
        return result

    def ritz(self, Z: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.scale != 1.0:
            return super().ritz(Z, rank)
        self.passes += 2
        result: tuple[Tensor, Tensor, Tensor] = self._body("ritz", Z)(self.weight, Z, rank)
        return result

    def triplets(self, V: Tensor, rank: int, AV: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if self.scale != 1.0:
            return super().triplets(V, rank, AV)
        self.passes += 2 if AV is None else 1
        result: tuple[Tensor, Tensor, Tensor] = self._body("triplets", V)(self.weight, V, rank, AV)
        return result

    def chebyshev(
        self, gram: Tensor | None, rank: int, block: int, tol: float, max_products: int, seed: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.scale != 1.0 or dispatch.select("chebyshev_filter", self.weight) != "csrc":
            return None
        m, n = self.shape
        start = gaussian(m if gram is None else n, block, seed, self.device)
        U, V, figures = dispatch.load("csrc").chebyshev(self.weight, gram, start, rank, tol, max_products)
        if bool(figures[0].isnan()):
            return None
        self.passes += int(figures[-1])
        return U, V, figures[:-1]

    def project(self, Q: Tensor) -> Projection:
        # (AQ)ᵀ(AQ), not Qᵀ(HQ), which is less accurate in directions whose singular values are small relative to ‖A‖
        AQ, HQ = self.both(Q)
        return Projection(AQ.mT @ AQ, HQ, AQ)

    def compress(self, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        AQ = self.apply(Q)
        return AQ.mT @ AQ, AQ

    def lanczos(self) -> Callable[..., Any] | None:
        """Steps of block Lanczos in one call of csrc."""
        if self.scale != 1.0 or dispatch.select("normal", self.weight) != "csrc":
            return None

        def steps(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            panel, coupling, figures = dispatch.load("csrc").lanczos(self.weight, *arguments)
            self.passes += 2 * int(figures[0])
            return panel, coupling, figures

        return steps

    def gram(self, dtype: torch.dtype) -> Tensor:
        self.passes += 2
        if self.scale != 1.0 or dtype != torch.float32:
            return reference.gram(self.weight, dtype, self.scale)
        result: Tensor = dispatch.bind("gram", self.weight)(self.weight)
        return result

    def dense(self) -> Tensor:
        self.passes += 2  # a factorization counts as two products
        return self._scaled(self.weight.float())

    def _body(self, verb: str, panel: Tensor) -> Callable[..., Any]:
        """The body of a verb for this weight; float64 panels are those of eigenvectors of a float64 Gram matrix."""
        key = verb, panel.dtype
        if key not in self._bodies:
            self._bodies[key] = dispatch.bind(verb, self.weight, panel.dtype)
        return self._bodies[key]

    def both(self, X: Tensor, pieces: int = 3) -> tuple[Tensor, Tensor]:
        """A·X and AᵀA·X."""
        if self.scale != 1.0:  # between the two products as well: the first one may overflow without it
            Y = self.apply(X)
            return Y, self.adjoint(Y)
        self.passes += 2
        result: tuple[Tensor, Tensor] = self._body("normal", X)(self.weight, X, pieces)
        return result
