"""What the iterative methods know of a weight: products with it, and nothing else.

Both operators stand for a stack of positive semidefinite matrices H = AᵀA (batch, n, n), A (m, n) a tall view of a
weight. Panels are (batch, n, k) float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from ..ops import dispatch, reference
from ..ops.dispatch import PRODUCTS


class Projection(NamedTuple):
    """XᵀHX (batch, k, k), H·X (batch, n, k), and A·X (batch, m, k) where it was computed on the way."""

    small: Tensor
    product: Tensor
    AQ: Tensor | None


class Operator(Protocol):
    """H = AᵀA for a stack of tall A, known by its products."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, m, n), m ≥ n."""

    @property
    def device(self) -> torch.device: ...

    def sketch(self, columns: int, seed: int) -> Tensor:
        """A random start (batch, n, columns) that H's leading eigenvectors already stand out in.

        Drawn on the CPU, so that every device starts from the same one, and the same for each of the stack, so that a
        weight's result does not depend on its company.
        """

    def multiply(self, X: Tensor) -> Tensor:
        """H·X (batch, n, k)."""

    def project(self, X: Tensor) -> Projection:
        """XᵀHX and H·X."""

    def compress(self, X: Tensor) -> tuple[Tensor, Tensor | None]:
        """XᵀHX and A·X alone, for half a product."""


class WeightOperator:
    """A stack of weights (batch, ·, ·), each times a power of two that keeps its squares inside float32's range.

    The power is applied to the panels, where it is exact, so no weight is copied. ``passes`` counts the products with
    each A or Aᵀ.

    Raises:
        ValueError: NaN or Inf in a weight.
    """

    def __init__(self, weights: Tensor) -> None:
        self.wide = weights.shape[1] < weights.shape[2]
        self.weights = weights.mT if self.wide else weights
        self.device = weights.device
        self.passes = 0
        # a single weight is multiplied as a matrix: one large BLAS call instead of a batch of one
        self._single = len(weights) == 1
        like = self.weights[0] if self._single else self.weights
        self._products = {
            (verb, dtype): dispatch.bind(verb, like, dtype)
            for verb in PRODUCTS
            for dtype in (torch.float32, torch.float64)  # eigenvectors of a float64 Gram matrix are float64 panels
        }
        self.scale: Tensor | None = None  # (batch, 1, 1); None for ones
        self.energy: list[float] = ops.sum_of_squares(weights).tolist()  # ‖A‖_F², the scale in it
        if any(map(math.isnan, self.energy)):
            raise ValueError("the weight holds NaN")
        # Krylov squares the operator: fourth powers of its norm have to stay inside float32
        if not all(1e-8 < energy < 1e8 for energy in self.energy):
            self._rescale(weights)

    def _rescale(self, weights: Tensor) -> None:
        largest = weights.abs().amax(dim=(1, 2)).tolist()
        if any(map(math.isinf, largest)):
            raise ValueError("the weight holds Inf")
        size = math.frexp(math.sqrt(weights[0].numel()))[1]
        exponents = [max(-126, min(126, -math.frexp(value)[1] - size)) if value else 0 for value in largest]
        if any(exponents):
            powers = [2.0**exponent for exponent in exponents]
            self.scale = torch.tensor(powers, dtype=torch.float32, device=self.device)[:, None, None]
            self.energy = reference.sum_of_squares(weights, self.scale).tolist()

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, m, n = self.weights.shape
        return batch, m, n

    def apply(self, X: Tensor) -> Tensor:
        """A·X (batch, m, k)."""
        self.passes += 1
        return self._product("matmul", self._scaled(X))

    def adjoint(self, Y: Tensor) -> Tensor:
        """Aᵀ·Y (batch, n, k)."""
        self.passes += 1
        return self._product("rmatmul", self._scaled(Y))

    def sketch(self, columns: int, seed: int) -> Tensor:
        """AᵀG, G Gaussian: half a power step for one product."""
        batch, m, _ = self.shape
        return self.adjoint(gaussian(m, columns, seed, self.device).expand(batch, -1, -1))

    def multiply(self, X: Tensor) -> Tensor:
        return self._both(X)[1]

    def project(self, X: Tensor) -> Projection:
        # not XᵀZ: the square of AX keeps directions that are small against A
        Y, Z = self._both(X)
        return Projection(Y.mT @ Y, Z, Y)

    def compress(self, X: Tensor) -> tuple[Tensor, Tensor | None]:
        Y = self.apply(X)
        return Y.mT @ Y, Y

    def gram(self, dtype: torch.dtype) -> Tensor:
        """AᵀA (batch, n, n), summed in ``dtype``."""
        batch, _, n = self.shape
        total = torch.zeros(batch, n, n, dtype=dtype, device=self.device)
        for _, _, rows in reference.row_blocks(self.weights, dtype):
            rows = self._scaled(rows)
            total.baddbmm_(rows.mT, rows)
        self.passes += 2
        return total

    def dense(self) -> Tensor:
        """A itself (batch, m, n) in float32."""
        self.passes += 2  # what a factorisation reads it for
        return self._scaled(self.weights.float())

    def _scaled(self, panel: Tensor) -> Tensor:
        return panel if self.scale is None else panel * self.scale

    def _product(self, verb: str, panel: Tensor) -> Tensor:
        product = self._products[verb, panel.dtype]
        result: Tensor = product(self.weights[0], panel[0])[None] if self._single else product(self.weights, panel)
        return result

    def _both(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """A·X and AᵀA·X."""
        if self.scale is not None:  # applied between the two products as well, where the first one may overflow
            Y = self.apply(X)
            return Y, self.adjoint(Y)
        self.passes += 2
        normal = self._products["normal", X.dtype]
        if not self._single:
            Y, Z = normal(self.weights, X)
            return Y, Z
        Y, Z = normal(self.weights[0], X[0])
        return Y[None], Z[None]


class GramOperator:
    """H as a matrix (batch, n, n) float32, where n is so small that forming it costs less than the products."""

    def __init__(self, gram: Tensor, rows: int) -> None:
        self.gram = gram
        self.rows = rows
        self.device = gram.device

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, n, _ = self.gram.shape
        return batch, self.rows, n

    def sketch(self, columns: int, seed: int) -> Tensor:
        """H·G: a whole power step, because here it costs no more than half of one."""
        batch, _, n = self.gram.shape
        return self.multiply(gaussian(n, columns, seed, self.device).expand(batch, -1, -1))

    def multiply(self, X: Tensor) -> Tensor:
        return self.gram @ X

    def project(self, X: Tensor) -> Projection:
        Z = self.multiply(X)
        return Projection(X.mT @ Z, Z, None)

    def compress(self, X: Tensor) -> tuple[Tensor, Tensor | None]:
        return X.mT @ self.multiply(X), None


def gaussian(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """(1, rows, columns) float32, the same on every device; torch's global random state is left alone."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(1, rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(device)
