"""Operators: the products with a weight that the iterative methods use.

Both operators represent a positive semidefinite matrix H = AᵀA (n, n), where A (m, n), m ≥ n, is a weight or its
transpose. Panels are (n, k) float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from ..ops import dispatch, reference
from ..ops.panels import column_residuals, recurrence, ritz_pairs, triplets_of
from .sketches import gaussian


class Projection(NamedTuple):
    """H projected onto the columns of a panel Q.

    Attributes:
        matrix: (k, k) QᵀHQ.
        HQ: (n, k) H·Q.
        AQ: (m, k) A·Q; None where H·Q is computed without it.
    """

    matrix: Tensor
    HQ: Tensor
    AQ: Tensor | None


class Operator(Protocol):
    """H = AᵀA for a tall A.

    Attributes:
        is_float32: whether products are float32 whatever the number of bfloat16 pieces that a panel may take.
        gives_image: whether projections give A·Q.
    """

    is_float32: bool
    gives_image: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), m ≥ n."""

    @property
    def device(self) -> torch.device: ...

    def sketch(self, columns: int, seed: int) -> Tensor:
        """Random start block (n, columns), amplified along the leading eigenvectors of H.

        The random numbers are drawn on the CPU, so they are the same on every device.
        """

    def filter(self, X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int) -> Tensor:
        """T_degree(2H/edge − 1)·X, see :func:`pissa_kernels.ops.reference.chebyshev_filter`."""

    def ritz(self, Z: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz pairs on the range of Z, see :func:`pissa_kernels.ops.reference.ritz`."""

    def project(self, Q: Tensor) -> Projection:
        """QᵀHQ, H·Q and A·Q."""

    def compress(self, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        """QᵀHQ and A·Q, without H·Q: half the products of :meth:`project` with a weight."""

    def lanczos(self) -> Callable[..., Any] | None:
        """:func:`pissa_kernels.ops.csrc.lanczos` without its first argument; None where steps are made one by one."""


class WeightOperator:
    """Products with a weight, scaled by a power of two that keeps its square in float32's range.

    The scale is applied to the panels, which is exact, so the weight is not copied.

    Args:
        weight: (rows, columns), float32, float16 or bfloat16, any strides.

    Attributes:
        weight: (m, n) the weight, or its transpose (a view) if it is wide.
        wide: whether the weight has fewer rows than columns.
        device: device of the weight.
        passes: number of products with A or Aᵀ so far.
        scale: a power of two, 1 for nearly every weight. A is the weight times its scale.
        energy: ‖A‖_F².

    Raises:
        ValueError: NaN or Inf in the weight.
    """

    is_float32 = False
    gives_image = True

    def __init__(self, weight: Tensor) -> None:
        self.wide = weight.shape[0] < weight.shape[1]
        self.weight = weight.mT if self.wide else weight
        self.device = weight.device
        self.passes = 0
        self._bodies: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}
        self.scale = 1.0
        self.energy = float(ops.sum_of_squares(weight.unsqueeze(0)))
        if math.isnan(self.energy):
            raise ValueError("the weight holds NaN")
        # orthonormalization squares H·Q, so fourth powers of ‖A‖ must stay in float32's range
        if not 1e-8 < self.energy < 1e8:
            self._rescale(weight)

    def _rescale(self, weight: Tensor) -> None:
        largest = float(weight.abs().amax())
        if math.isinf(largest):
            raise ValueError("the weight holds Inf")
        size = math.frexp(math.sqrt(weight.numel()))[1]
        if largest:
            self.scale = 2.0 ** max(-126, min(126, -math.frexp(largest)[1] - size))
            self.energy = float(reference.sum_of_squares(weight.unsqueeze(0), self.scale))

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight.shape
        return m, n

    def apply(self, X: Tensor) -> Tensor:
        """A·X (m, k)."""
        self.passes += 1
        result: Tensor = self._body("matmul", X)(self.weight, self._scaled(X))
        return result

    def adjoint(self, Y: Tensor) -> Tensor:
        """Aᵀ·Y (n, k)."""
        self.passes += 1
        result: Tensor = self._body("rmatmul", Y)(self.weight, self._scaled(Y))
        return result

    def sketch(self, columns: int, seed: int) -> Tensor:
        """AᵀG for a Gaussian G: half a power step, for one product."""
        return self.adjoint(gaussian(self.shape[0], columns, seed, self.device))

    def filter(self, X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int) -> Tensor:
        """T_degree(2H/edge − 1)·X."""
        if self.scale != 1.0:
            return recurrence(lambda panel, split: self.both(panel, split)[1], X, HX, edge, degree, pieces)
        self.passes += 2 * (degree - 1)
        result: Tensor = self._body("chebyshev_filter", X)(self.weight, X, HX, edge, degree, pieces)
        return result

    def ritz(self, Z: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz pairs on the range of Z."""
        if self.scale != 1.0:
            return ritz_pairs(Z, rank, lambda Q: self.project(Q)[1::-1])
        self.passes += 2
        result: tuple[Tensor, Tensor, Tensor] = self._body("ritz", Z)(self.weight, Z, rank)
        return result

    def triplets(self, V: Tensor, rank: int, AV: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Triplets on the range of V, see :func:`pissa_kernels.ops.reference.triplets`."""
        if self.scale != 1.0:
            return triplets_of(V, rank, AV, self.apply, self.adjoint)
        self.passes += 2 if AV is None else 1
        result: tuple[Tensor, Tensor, Tensor] = self._body("triplets", V)(self.weight, V, rank, AV)
        return result

    def chebyshev(
        self, gram: Tensor | None, rank: int, block: int, tol: float, max_products: int, seed: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Triplets by :mod:`pissa_kernels.svd.chebyshev` in one call.

        None where no backend has the whole iteration, where a panel needs Householder QR, or where LAPACK has failed.

        Args:
            gram: H, if the iteration goes through it.
            rank, block, tol, max_products, seed: as for the iteration.

        Returns:
            U (m, rank), V (n, rank), and the figures of :func:`pissa_kernels.ops.reference.triplets`.
        """
        if self.scale != 1.0 or dispatch.select("chebyshev_filter", self.weight) != "csrc":
            return None
        m, n = self.shape
        start = gaussian(m if gram is None else n, block, seed, self.device)
        U, V, figures = dispatch.load("csrc").chebyshev(self.weight, gram, start, rank, tol, max_products)
        if bool(figures[0].isnan()):
            return None
        self.passes += int(figures[-1])
        return U, V, figures[:-1]

    def residuals(self, U: Tensor, S: Tensor, V: Tensor, AV: Tensor) -> Tensor:
        """max(‖A·vᵢ − σᵢ·uᵢ‖, ‖Aᵀ·uᵢ − σᵢ·vᵢ‖) (r,), with A·V known."""
        return torch.maximum(column_residuals(AV, U, S), column_residuals(self.adjoint(U), V, S))

    def project(self, Q: Tensor) -> Projection:
        """QᵀHQ, H·Q and A·Q."""
        # (AQ)ᵀ(AQ), not Qᵀ(HQ), which is less accurate in directions whose singular values are small relative to ‖A‖
        AQ, HQ = self.both(Q)
        return Projection(AQ.mT @ AQ, HQ, AQ)

    def compress(self, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        """QᵀHQ and A·Q."""
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
        """AᵀA (n, n), summed in ``dtype``."""
        self.passes += 2
        if self.scale != 1.0 or dtype != torch.float32:
            return reference.gram(self.weight, dtype, self.scale)
        result: Tensor = dispatch.bind("gram", self.weight)(self.weight)
        return result

    def dense(self) -> Tensor:
        """A itself (m, n) in float32."""
        self.passes += 2  # a factorization counts as two products
        return self._scaled(self.weight.float())

    def _scaled(self, panel: Tensor) -> Tensor:
        return panel if self.scale == 1.0 else panel * self.scale

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


class GramOperator:
    """Products with H formed as a matrix, for n so small that this takes less time than products with A.

    Args:
        gram: (n, n) float32 H.
        rows: m.
    """

    is_float32 = True
    gives_image = False

    def __init__(self, gram: Tensor, rows: int) -> None:
        self.gram = gram
        self.device = gram.device
        self.shape = rows, len(gram)
        self._filter, self._ritz = dispatch.bind("chebyshev_filter", gram), dispatch.bind("ritz", gram)

    def sketch(self, columns: int, seed: int) -> Tensor:
        """H·G for a Gaussian G: a full power step, for one product."""
        return self.gram @ gaussian(len(self.gram), columns, seed, self.device)

    def filter(self, X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int) -> Tensor:
        """T_degree(2H/edge − 1)·X."""
        result: Tensor = self._filter(self.gram, X, HX, edge, degree, pieces, gram=True)
        return result

    def ritz(self, Z: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz pairs on the range of Z."""
        result: tuple[Tensor, Tensor, Tensor] = self._ritz(self.gram, Z, rank, gram=True)
        return result

    def project(self, Q: Tensor) -> Projection:
        """QᵀHQ and H·Q."""
        HQ = self.gram @ Q
        return Projection(Q.mT @ HQ, HQ, None)

    def compress(self, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        """QᵀHQ."""
        return self.project(Q).matrix, None

    def lanczos(self) -> None:
        """Steps are made one by one."""
