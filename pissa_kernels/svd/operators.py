"""Operators: the products with a weight that the iterative methods use.

Operators represent a positive semidefinite matrix H = AᵀA (n, n), where A (m, n), m ≥ n, is a weight or its
transpose. Panels are (n, k) float32. Those of a weight are in :mod:`.weight_operator`, and in :mod:`.sharded` where
several processes hold the weight.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops import dispatch
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


class ScaledOperator(abc.ABC):
    """What every operator on a weight has in common, from its products with panels.

    The weight is scaled by a power of two that keeps its square in float32's range. The scale is applied to the panels,
    which is exact, so the weight is not copied.

    Attributes:
        wide: whether the weight has fewer rows than columns, so that A is its transpose.
        device: device of the panels.
        passes: number of products with A or Aᵀ so far.
        scale: a power of two, 1 for nearly every weight. A is the weight times its scale.
        energy: ‖A‖_F².
    """

    is_float32 = False
    gives_image = True

    wide: bool
    device: torch.device
    scale: float
    energy: float

    def __init__(self) -> None:
        self.passes = 0

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n), m ≥ n."""

    @abc.abstractmethod
    def apply(self, X: Tensor) -> Tensor:
        """A·X (m, k)."""

    @abc.abstractmethod
    def adjoint(self, Y: Tensor) -> Tensor:
        """Aᵀ·Y (n, k)."""

    @abc.abstractmethod
    def normal(self, X: Tensor, pieces: int = 3) -> Tensor:
        """AᵀA·X (n, k)."""

    @abc.abstractmethod
    def project(self, Q: Tensor) -> Projection:
        """QᵀHQ, H·Q and A·Q."""

    @abc.abstractmethod
    def compress(self, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        """QᵀHQ and A·Q."""

    @abc.abstractmethod
    def gram(self, dtype: torch.dtype) -> Tensor:
        """AᵀA (n, n), summed in ``dtype``."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """A itself (m, n) in float32."""

    def sketch(self, columns: int, seed: int) -> Tensor:
        """AᵀG for a Gaussian G: half a power step, for one product."""
        return self.adjoint(gaussian(self.shape[0], columns, seed, self.device))

    def filter(self, X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int) -> Tensor:
        """T_degree(2H/edge − 1)·X."""
        return recurrence(self.normal, X, HX, edge, degree, pieces)

    def ritz(self, Z: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz pairs on the range of Z."""
        return ritz_pairs(Z, rank, lambda Q: self.project(Q)[1::-1])

    def triplets(self, V: Tensor, rank: int, AV: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Triplets on the range of V, see :func:`pissa_kernels.ops.reference.triplets`."""
        return triplets_of(V, rank, AV, self.apply, self.adjoint)

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
        return None

    def lanczos(self) -> Callable[..., Any] | None:
        """Steps of block Lanczos in one call; None where they are made one by one."""
        return None

    def residuals(self, U: Tensor, S: Tensor, V: Tensor, AV: Tensor) -> Tensor:
        """max(‖A·vᵢ − σᵢ·uᵢ‖, ‖Aᵀ·uᵢ − σᵢ·vᵢ‖) (r,), with A·V known."""
        return torch.maximum(column_residuals(AV, U, S), column_residuals(self.adjoint(U), V, S))

    def _scaled(self, panel: Tensor) -> Tensor:
        return panel if self.scale == 1.0 else panel * self.scale


def needs_scale(energy: float) -> bool:
    """Whether a weight is scaled, by its ‖W‖_F²: orthonormalization squares H·Q, that is, the square of the energy."""
    return not 1e-8 < energy < 1e8


def scale_for(largest: float, elements: int) -> float:
    """The power of two by which a weight is scaled.

    Args:
        largest: max |w|, above 0.
        elements: number of elements of the weight.
    """
    size = math.frexp(math.sqrt(elements))[1]
    return float(2.0 ** max(-126, min(126, -math.frexp(largest)[1] - size)))


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
