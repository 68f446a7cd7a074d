"""One operation of :mod:`pissa_kernels.ops.batched` on a batch: its inputs, its call, its error against float64.

What is allowed is a multiple of the error of plain torch (:mod:`pissa_kernels.ops.batched_reference`) on the same
inputs, within bounds that hold for any input.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..harness.dtypes import DTYPES

Errors = dict[str, float]


class Limit(NamedTuple):
    """The largest error allowed: ``factor`` times torch's own, at least ``least`` and at most ``most``."""

    factor: float
    least: float
    most: float

    def allowed(self, own: float) -> float:
        return min(max(self.factor * own, self.least), self.most)


@dataclass(frozen=True)
class BatchedCase(abc.ABC):
    """An operation on a batch.

    Attributes:
        m, n: shape of a matrix.
        dtype: of the weights: "bf16", "fp16" or "fp32".
        batch: number of matrices.
    """

    m: int
    n: int
    dtype: str = "fp32"
    batch: int = 3

    @property
    @abc.abstractmethod
    def function(self) -> str:
        """Name of the operation."""

    @property
    def name(self) -> str:
        return f"{self.function}-{self.batch}x{self.m}x{self.n}-{self.dtype}"

    @property
    @abc.abstractmethod
    def limits(self) -> Mapping[str, Limit]:
        """The largest errors."""

    @abc.abstractmethod
    def inputs(self, device: str) -> Any:
        """Tensors on a device, equal for equal arguments."""

    @abc.abstractmethod
    def call(self, body: Any, inputs: Any, count: int) -> tuple[Tensor, ...]:
        """The operation of a module on the first ``count`` matrices."""

    @abc.abstractmethod
    def errors(self, inputs: Any, results: tuple[Tensor, ...]) -> Errors:
        """The largest error of each kind against float64."""

    def units(self, found: Errors, own: Errors) -> float:
        """The largest error in units of what is allowed.

        Args:
            found: errors of an implementation.
            own: errors of plain torch.
        """
        ratios = [found[kind] / limit.allowed(own[kind]) for kind, limit in self.limits.items()]
        return max(ratio if math.isfinite(ratio) else math.inf for ratio in ratios)

    def weights(self, device: str) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(self.m + self.n)
        shape = (self.batch, self.m, self.n)
        return list(torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype]))


def largest(figures: list[float]) -> float:
    """The largest figure; NaN if one is."""
    return float("nan") if any(map(math.isnan, figures)) else max(figures)
