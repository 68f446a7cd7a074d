"""What the fixed schedule finds for a batch: triplets, and the figures that certify them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .result import Certificate

# Round-off of a measured residual, relative to σ₁: U in two pieces, and float32 sums.
MEASUREMENT_ROUNDOFF = 2.0**-16


class Figures(NamedTuple):
    """What is measured of one weight.

    Attributes:
        deficit: estimated energy deficit; NaN where the triplets are unusable.
        residual: largest ‖Aᵀuᵢ − σᵢvᵢ‖.
        largest: σ₁.
        captured: Σσᵢ².
        energy: ‖A‖_F²; NaN or Inf where the weight holds one.
        passes: number of products with A or Aᵀ.
    """

    deficit: float
    residual: float
    largest: float
    captured: float
    energy: float
    passes: int

    def certificate(self, tol: float) -> Certificate:
        """The certificate for a tolerance on the energy deficit."""
        relative = self.residual / self.largest + MEASUREMENT_ROUNDOFF if self.largest > 0 else 0.0
        share = min(self.captured / self.energy, 1.0) if self.energy > 0 else 1.0
        return Certificate(self.passes, share, relative, self.deficit <= tol, "fixed")


@dataclass(eq=False)
class Solution:
    """Triplets of a batch, and the figures of each member.

    Attributes:
        U: (batch, m, r) float32.
        S: (batch, r) float32, descending.
        V: (batch, n, r) float32.
        figures: of each member.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    figures: list[Figures]

    def update(self, members: list[int], other: Solution) -> None:
        """Replace some members by those of another solution."""
        for place, member in enumerate(members):
            for mine, theirs in ((self.U, other.U), (self.S, other.S), (self.V, other.V)):
                mine[member].copy_(theirs[place])
            self.figures[member] = other.figures[place]
