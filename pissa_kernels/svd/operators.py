"""Operators: the products with a weight that the iterative methods use.

Both operators represent a batch of positive semidefinite matrices H = AᵀA (batch, n, n), where A (m, n), m ≥ n, is a
weight or its transpose. Panels are (batch, n, k) float32.
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
    """H projected onto the columns of a panel Q.

    Attributes:
        matrix: (batch, k, k) QᵀHQ.
        HQ: (batch, n, k) H·Q.
        AQ: (batch, m, k) A·Q; None where H·Q is computed without it.
    """

    matrix: Tensor
    HQ: Tensor
    AQ: Tensor | None


class Operator(Protocol):
    """H = AᵀA for a batch of tall A."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, m, n), m ≥ n."""

    @property
    def device(self) -> torch.device: ...

    def sketch(self, columns: int, seed: int) -> Tensor:
        """Random start block (batch, n, columns), amplified along the leading eigenvectors of H.

        The random numbers are drawn on the CPU, so they are the same on every device, and they are the same for every
        matrix of the batch, so that a result does not depend on the other matrices.
        """

    def multiply(self, X: Tensor) -> Tensor:
        """H·X (batch, n, k)."""

    def project(self, Q: Tensor) -> Projection:
        """QᵀHQ, H·Q and A·Q."""

    def compress(self, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        """QᵀHQ and A·Q, without H·Q: half the products of :meth:`project` with a weight."""


class WeightOperator:
    """Products with a batch of weights, each scaled by a power of two that keeps their squares in float32's range.

    The scale is applied to the panels, which is exact, so no weight is copied.

    Args:
        weights: (batch, rows, columns), float32, float16 or bfloat16, any strides.

    Attributes:
        weights: (batch, m, n) the weights, or their transposes (views) if they are wide.
        wide: whether the weights have fewer rows than columns.
        device: device of the weights.
        passes: number of products with each A or Aᵀ so far.
        scale: (batch, 1, 1) float32; None where no weight needs one. A is the weight times its scale.
        energy: ‖A‖_F² of each A.

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
        self.scale: Tensor | None = None
        self.energy: list[float] = ops.sum_of_squares(weights).tolist()
        if any(map(math.isnan, self.energy)):
            raise ValueError("the weight holds NaN")
        # orthonormalization squares H·Q, so fourth powers of ‖A‖ must stay in float32's range
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
        """AᵀG for a Gaussian G: half a power step, for one product."""
        batch, m, _ = self.shape
        return self.adjoint(gaussian(m, columns, seed, self.device).expand(batch, -1, -1))

    def multiply(self, X: Tensor) -> Tensor:
        """H·X."""
        return self._both(X)[1]

    def project(self, Q: Tensor) -> Projection:
        """QᵀHQ, H·Q and A·Q."""
        # (AQ)ᵀ(AQ), not Qᵀ(HQ), which is less accurate in directions whose singular values are small relative to ‖A‖
        AQ, HQ = self._both(Q)
        return Projection(AQ.mT @ AQ, HQ, AQ)

    def compress(self, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        """QᵀHQ and A·Q."""
        AQ = self.apply(Q)
        return AQ.mT @ AQ, AQ

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
        self.passes += 2  # a factorization counts as two products
        return self._scaled(self.weights.float())

    def _scaled(self, panel: Tensor) -> Tensor:
        return panel if self.scale is None else panel * self.scale

    def _product(self, verb: str, panel: Tensor) -> Tensor:
        product = self._products[verb, panel.dtype]
        result: Tensor = product(self.weights[0], panel[0])[None] if self._single else product(self.weights, panel)
        return result

    def _both(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """A·X and AᵀA·X."""
        if self.scale is not None:  # between the two products as well: the first one may overflow without it
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
    """Products with H formed as a matrix, for n so small that this takes less time than products with A.

    Args:
        gram: (batch, n, n) float32 H.
        rows: m.
    """

    def __init__(self, gram: Tensor, rows: int) -> None:
        self.gram = gram
        self.rows = rows
        self.device = gram.device

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, n, _ = self.gram.shape
        return batch, self.rows, n

    def sketch(self, columns: int, seed: int) -> Tensor:
        """H·G for a Gaussian G: a full power step, for one product."""
        batch, _, n = self.gram.shape
        return self.multiply(gaussian(n, columns, seed, self.device).expand(batch, -1, -1))

    def multiply(self, X: Tensor) -> Tensor:
        """H·X."""
        return self.gram @ X

    def project(self, Q: Tensor) -> Projection:
        """QᵀHQ and H·Q."""
        HQ = self.multiply(Q)
        return Projection(Q.mT @ HQ, HQ, None)

    def compress(self, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        """QᵀHQ."""
        return Q.mT @ self.multiply(Q), None


def gaussian(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Gaussian matrix (1, rows, columns) float32, the same on every device, from a generator of its own."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(1, rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(device)


def random_signs(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Matrix (rows, columns) float32 of random signs, the same on every device: one bit of a drawn byte each."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    count = -(-rows * columns // 8)
    drawn = torch.randint(256, (count, 1), generator=generator, dtype=torch.uint8, device="cpu")
    if device.type == "cuda":
        drawn = drawn.pin_memory()
    bits = drawn.to(device, non_blocking=True) >> torch.arange(8, dtype=torch.uint8, device=device) & 1
    return bits.flatten()[: rows * columns].view(rows, columns).float().mul_(2).sub_(1)
