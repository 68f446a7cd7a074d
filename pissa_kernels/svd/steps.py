"""The steps of :mod:`.fixed` for one batch: sketch, filter, orthonormalization, projection with its certificate.

References:
    .. [1] T. Fukaya, R. Kannan, Y. Nakatsukasa, Y. Yamamoto, Y. Yanagisawa: Shifted Cholesky QR for computing the QR
       factorization of ill-conditioned matrices. SIAM Journal on Scientific Computing 42, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.batched import Panel, Update, Weights
from .sketches import random_signs
from .solution import Figures, Solution
from .stopping import CLUSTER_GAP, GUARD_VECTORS

# bfloat16 pieces of a panel: for filters, and for their last product and what is measured. Products of panels with
# panels take three of each, which is float32.
ROUGH, FINE, FULL = 1, 2, 3
# Shifts of the rounds of CholeskyQR, relative to a unit diagonal. The first makes the factorization succeed for any
# columns, each round reduces the condition number, and the last of a panel that is measured has no shift.
SHIFTS = (1e-4, 1e-5)
FINAL_SHIFTS = (1e-4, 1e-5, 0.0)
EDGE_SHIFT = 1e-6
# Smallest edge relative to the largest diagonal element of R: T_4 grows to 8·(2/edge)⁴, and its square is summed.
MIN_EDGE = 2e-4
# Largest element of |UᵀU − I| and |VᵀV − I| that is round-off. Rank-deficient panels have larger ones, and so have
# singular values that are small relative to σ₁.
MAX_SKEW = 3e-5
# ‖W‖_F² outside of which squares in float32 may over- or underflow. Such weights go to the methods that scale them.
ENERGY_RANGE = (1e-8, 1e8)


class Steps:
    """The steps of the schedule for one batch.

    Products write their results as the next ones read them: as pieces for panels and bfloat16 weights, as values for
    other weights and for sums.
    """

    def __init__(self, weights: Any, rank: int, passes: int = 0) -> None:
        self.weights = weights
        self.rank = rank
        self.passes = passes
        self.body: Any = self.body_of(weights)
        self.in_pieces = weights.dtype == torch.bfloat16

    def body_of(self, weights: Weights) -> Any:
        """The module of the operations on these weights."""
        return dispatch.bodies(weights)

    def part(self, members: list[int]) -> Steps:
        """The steps for some members of the batch."""
        tensors = [self.weights.tensors[member] for member in members]
        return Steps(Weights.of(tensors), self.rank, self.passes)

    def sketch(self, columns: int, seed: int) -> Panel:
        """Orthonormal basis of the range of H·Aᵀ·G, with G of random signs, the same for every weight and device."""
        batch, m, _ = self.weights.shape
        signs = random_signs(m, columns, seed, self.weights.device)
        if self.in_pieces:  # one piece is exact
            G = Panel(None, signs.bfloat16().expand(1, batch, m, columns))
        else:
            G = Panel(signs.expand(batch, m, columns).contiguous(), None)
        X = self._product(self.weights.mT, G, ROUGH)
        return self._orthonormalized(self._normal(X, ROUGH, values=False), SHIFTS)

    def identity(self) -> Panel:
        """The identity as a panel."""
        batch, _, n = self.weights.shape
        return self._split(torch.eye(n, device=self.weights.device).expand(batch, n, n).contiguous())

    def filtered(self, X: Panel, pieces: list[int], last: bool = False) -> Panel:
        """Orthonormal basis of T_d(2H/a − 1)·X, with ``pieces[k]`` pieces in the k-th of d products with H.

        The edge a is the smallest diagonal element of R in H·X = Q·R: about the b-th eigenvalue of H.
        """
        HX = self._normal(X, pieces[0])
        _, diagonal = self.body.inverse_cholesky(self._gram(HX), EDGE_SHIFT)
        edge = torch.maximum(diagonal.amin(-1), MIN_EDGE * diagonal.amax(-1))
        values = torch.addcmul(-X.full, HX.full, (2 / edge)[:, None, None])
        previous, current = X, self._panel(values, pieces[1])
        for place in range(1, len(pieces)):
            update = Update(4 / edge, -2.0, current.full, -1.0, previous.full)
            following = pieces[place + 1] if place + 1 < len(pieces) else 0
            Y = self._product(self.weights, current, pieces[place])
            self.passes += 1
            filtered = self.body.product(
                self.weights.mT,
                Y,
                precision=pieces[place],
                update=update,
                values=following > 0,
                pieces=self._stored(following) if following else FULL,
            )
            previous, current = current, filtered
        return self._orthonormalized(current, FINAL_SHIFTS if last else SHIFTS)

    def projected(self, X: Panel) -> Solution:
        """The triplets of the weights on the subspaces spanned by the panels, and their figures: one transfer."""
        r, body = self.rank, self.body
        AX = body.product(self.weights, X, precision=FINE, values=False, pieces=FULL)
        self.passes += 1
        # the second time, the columns of A·V are nearly orthogonal: their products are accurate relative to both
        all_values, V, AV = self._rotated(X, AX)
        values, V, AV = self._rotated(V, AV)
        S = values.clamp(min=0).sqrt()
        # (batch, m, r); of a sharded weight the rows that this process has, like A·V
        U = self._split(AV.full * torch.where(S > 0, S.reciprocal(), 0.0)[:, None, :])
        update = Update(torch.ones_like(S[:, 0]), -1.0, V.full * S[:, None, :])
        residuals = body.product(self.weights.mT, U, precision=FINE, update=update, pieces=FULL)
        self.passes += 1
        norms = self._norms(residuals)
        identity = torch.eye(r, device=S.device)
        skew = torch.stack([self.gram_of_image(U) - identity, self._gram(V) - identity]).abs().amax((0, -2, -1))
        deficit = self._deficit(values, V, residuals, self._guard(all_values))
        energy = body.sum_of_squares(self.weights)
        low, high = ENERGY_RANGE
        usable = (skew <= MAX_SKEW) & (low < energy) & (energy < high)
        deficit = torch.where(usable, deficit, torch.nan)
        captured = S.double().square().sum(-1)
        figures = self.decided(torch.stack([deficit, norms.amax(-1).double(), S[:, 0].double(), captured, energy]))
        found = list(map(Figures, *figures.tolist(), [self.passes] * len(S)))
        return Solution(self.whole_image(U), S, V.full, found)

    def gram_of_image(self, Z: Panel) -> Tensor:
        """ZᵀZ of a panel (batch, m, k)."""
        return self._gram(Z)

    def whole_image(self, Z: Panel) -> Tensor:
        """The values of a panel (batch, m, k)."""
        return Z.full

    def decided(self, figures: Tensor) -> Tensor:
        """The figures that decide what follows."""
        return figures

    def _rotated(self, V: Panel, AV: Panel) -> tuple[Tensor, Panel, Panel]:
        """Every Ritz value on span(V), and the leading Ritz vectors V with A·V."""
        values, vectors = self.body.eigh(self.gram_of_image(AV))
        leading = self._split(vectors[:, :, : self.rank].contiguous())
        V, AV = (self.body.product(panel, leading, precision=FULL, pieces=FULL) for panel in (V, AV))
        return values, V, AV

    def _guard(self, values: Tensor) -> Tensor:
        """The Ritz value GUARD_VECTORS places after the last wanted one, 0 where there is nothing outside the panel."""
        place = self.rank + GUARD_VECTORS
        if place >= values.shape[1] == self.weights.shape[2]:
            return torch.zeros_like(values[:, 0])
        return values[:, place]

    def _deficit(self, values: Tensor, V: Panel, residuals: Panel, guard: Tensor) -> Tensor:
        """Estimated energy deficit: twice the second-order errors of the Ritz values.

        The part of a residual R of an eigenpair of H that lies in span(V) only mixes wanted vectors. The rest lies in
        the space that has not been resolved, and the eigenvalue of its components is ‖A·R‖²/‖R‖² on average. The error
        of the Ritz value θ is about ‖R‖²/(θ − that average). In a cluster the components near θ count, however small
        they are, and the gap to a guard vector takes the place of that to the average.

        Args:
            values: (batch, r) θᵢ.
            V: (batch, n, r).
            residuals: (batch, n, r) Aᵀuᵢ − σᵢvᵢ, which is R/σᵢ.
            guard: (batch,) Ritz value of the guard vector.
        """
        inside = self.body.product(V.mT, residuals, precision=FULL, values=False, pieces=FULL)
        update = Update(-torch.ones_like(values[:, 0]), 1.0, residuals.full)
        outside = self.body.product(V, inside, precision=FULL, update=update, pieces=FULL)
        norms = self._norms(outside)
        directions = self._panel(outside.full * torch.where(norms > 0, norms.reciprocal(), 0.0)[:, None, :], ROUGH)
        AR = self.body.product(self.weights, directions, precision=ROUGH, values=False, pieces=FULL)
        self.passes += 1
        norms = norms * values.clamp(min=0).sqrt()
        lengths = self.gram_of_image(AR).diagonal(dim1=-2, dim2=-1).clamp(min=0)
        estimate = 2 * _estimated_deficits(values, norms, lengths)
        last = values[:, -1]
        cautious = torch.maximum(estimate, 2 * _estimated_deficits(values, norms, guard.unsqueeze(-1)))
        return torch.where(last - guard < CLUSTER_GAP * last, cautious, estimate)

    def _norms(self, Z: Panel) -> Tensor:
        """Norm of each column, by an operation whose order of sums does not depend on the batch, as torch's does."""
        return self._gram(Z).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    def _orthonormalized(self, Z: Panel, shifts: Sequence[float]) -> Panel:
        """Orthonormal basis of the range of Z, by a round of CholeskyQR for each shift."""
        for place, shift in enumerate(shifts):
            change, _ = self.body.inverse_cholesky(self._gram(Z), shift)
            Z = self.body.product(Z, change, precision=FULL, values=place == len(shifts) - 1, pieces=FULL)
        return Z

    def _gram(self, Z: Panel) -> Tensor:
        gram: Tensor = self.body.product(Z.mT, Z, precision=FULL).values
        return gram

    def _normal(self, X: Panel, precision: int, values: bool = True) -> Panel:
        """H·X, in pieces and in values as well."""
        Y = self._product(self.weights, X, precision)
        self.passes += 1
        HX: Panel = self.body.product(self.weights.mT, Y, precision=precision, values=values, pieces=FULL)
        return HX

    def _product(self, weights: Weights, X: Panel, precision: int) -> Panel:
        """A product that only another product reads."""
        self.passes += 1
        stored = self._stored(precision)
        product: Panel = self.body.product(weights, X, precision=precision, values=not stored, pieces=stored)
        return product

    def _split(self, values: Tensor) -> Panel:
        """A panel for products with weights and with panels."""
        return Panel(values, self.body.split(values, FULL))

    def _panel(self, values: Tensor, pieces: int) -> Panel:
        """A panel for products with weights only."""
        return Panel(values, self.body.split(values, pieces) if self.in_pieces else None)

    def _stored(self, pieces: int) -> int:
        return pieces if self.in_pieces else 0


def _estimated_deficits(ritz_values: Tensor, residuals: Tensor, edges: Tensor) -> Tensor:
    """:func:`pissa_kernels.svd.stopping.estimated_deficit` (batch,) float64, with an edge for each residual (batch, r).

    The edges may also be (batch, 1).
    """
    ritz_values, residuals = ritz_values.double(), residuals.double()
    gaps = (ritz_values - edges.double()).clamp(min=0) + residuals
    errors = torch.where(gaps > 0, residuals.square() / gaps, 0.0).sum(-1)
    total = ritz_values.clamp(min=0).sum(-1)
    return torch.where(total > 0, errors / total, 0.0)
