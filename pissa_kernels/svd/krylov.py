"""Block Krylov: the leading eigenvectors of H = AᵀA from a few products with it.

Block Lanczos with full reorthogonalisation (Golub & Underwood 1977; for its accuracy from a random start Musco & Musco
2015, Tropp & Webber 2023, arXiv 2306.12418) and thick restart (Wu & Simon 2000). The basis is built on A's smaller
side only. Each step multiplies the newest block by H, which completes the projection T = QᵀHQ and yields the next
block; the last step needs QᵀHQ alone, so one product and not two.

What was measured (``python -m bench engine``, and the same spectra on diagonal matrices):

- To a tolerance, C ≈ 5r + 7b columns reach an energy deficit of 1e-6 with blocks of b: small blocks need fewer columns
  and more steps, and BLAS decides (:mod:`pissa_kernels.svd.cost`).
- A restart at 4r to 6r columns that keeps 2r costs a step or two, and bounds the eigenproblems of T, which at 1000
  columns would take as long as five products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .operators import Operator
from .orthogonalize import orthonormalize

# How far after the last wanted Ritz value its neighbour is read: a chance neighbour of σ_r is no cluster.
GUARD_VECTORS = 8
# A neighbour closer than this, relative to θ_r, is one of a cluster.
CLUSTERED = 2e-3
# What the missing energy is expected to fall by at the very best in a step with a block as wide as the rank.
FASTEST = 0.02


class Subspace(NamedTuple):
    """What an iterative method found, for a stack.

    Attributes:
        V: (batch, n, rank) float32, orthonormal: the leading Ritz vectors of H.
        AV: (batch, m, rank) A·V where it came for nothing, else None.
        missing: of the energies θᵢ = ‖A·vᵢ‖² (batch, r) and the residuals ‖H·vᵢ − θᵢ·vᵢ‖ (batch, r) of these vectors,
            measured anew: the estimated energy deficit (batch,).
    """

    V: Tensor
    AV: Tensor | None
    missing: Callable[[Tensor, Tensor], Tensor]


@functools.cache
def steps_for_niter(niter: int) -> int:
    """Krylov steps that amplify every wanted direction as much as ``niter`` rounds of subspace iteration do.

    With x = σᵢ²/σ_tail², N rounds of ``svd_lowrank`` scale direction i against the tail by x^(N+1), K steps from AᵀG
    by √x·T_K(2x−1), T_K the Chebyshev polynomial (Musco & Musco 2015, §4). The first grows faster for large x, so K is
    the least for which it overtakes only where it has already pushed the tail's energy below 1e-9 of the direction's.
    """
    ratios = torch.logspace(0, 6, 2000, dtype=torch.float64, device="cpu")[1:]
    subspace = 2 * (niter + 1) * ratios.log()
    unsettled = subspace < math.log(1e9)
    angle = torch.arccosh(2 * ratios - 1)
    steps = 1
    while True:
        # log T_K(cosh a) = log cosh(K·a), written so that it does not overflow
        chebyshev = steps * angle + torch.log1p(torch.exp(-2 * steps * angle)) - math.log(2)
        if bool((ratios.log() + 2 * chebyshev >= subspace)[unsettled].all()):
            return steps
        steps += 1


def missing_energy(energies: Tensor, residuals: Tensor, edge: Tensor) -> Tensor:
    """The share of Σθᵢ that the exact leading eigenvalues of H have beyond the Ritz values θᵢ, to second order.

    A Ritz pair with residual r lacks r²/gap, the gap to the part of the spectrum that its residual lies in, and no more
    than about r where r exceeds the gap (Parlett 1998, §11.7).

    Args:
        energies: (batch, r) θᵢ.
        residuals: (batch, r) ‖H·vᵢ − θᵢ·vᵢ‖.
        edge: (batch,) where that part of the spectrum ends.

    Returns:
        (batch,) float64.
    """
    energies, residuals = energies.double(), residuals.double()
    gaps = (energies - edge.double().unsqueeze(-1)).clamp(min=0) + residuals
    lacking = torch.where(gaps > 0, residuals.square() / gaps, 0.0).sum(-1)
    total = energies.clamp(min=0).sum(-1)
    return torch.where(total > 0, lacking / total, 0.0)


class Unresolved(NamedTuple):
    """What a Krylov basis knows of the eigenvalues that it has not found.

    Attributes:
        edge: (batch,) the largest eigenvalue of H on the newest panel, which every residual is close to lying in.
        neighbour: (batch,) the Ritz value GUARD_VECTORS places after the last wanted one.
    """

    edge: Tensor
    neighbour: Tensor

    def missing(self, energies: Tensor, residuals: Tensor) -> Tensor:
        """:func:`missing_energy` with a factor of safety of 2.

        With it, the estimate is 0.7 to 3 times the truth at tolerances of 1e-5 and less, and at 1e-3, where second
        order is rough, no less than 0.4 of it, on the diagonal matrices of ``tests/svd/test_iterations.py`` at ranks 4
        to 128. Between these it can be 0.1 of it, on weights with the spectra of real ones: vectors that mix half a
        dozen directions of nearly one value have small residuals, and lack one of these directions all the same.

        In a cluster, hundreds of values that agree to three digits, the newest panel may have left it while the basis
        has not found all of it; there the gap to ``neighbour`` counts, which elsewhere gives up to ten times too much.
        """
        estimate = 2 * missing_energy(energies, residuals, self.edge)
        cautious = 2 * missing_energy(energies, residuals, self.neighbour)
        last = energies.amin(-1)
        clustered = last - self.neighbour < CLUSTERED * last
        return torch.where(clustered, torch.maximum(estimate, cautious), estimate)


def block_krylov(
    operator: Operator,
    rank: int,
    *,
    block: int,
    limit: int,
    tol: float,
    steps: int | None = None,
    max_steps: int,
    check_every: int = 1,
    seed: int,
    start: Tensor | None = None,
) -> Subspace:
    """The leading eigenvectors of each H of a stack.

    Args:
        operator: H, finite, scaled so that its square neither overflows nor vanishes in float32.
        rank: r.
        block: b, the columns of one block.
        limit: columns of the largest basis, at least r + GUARD_VECTORS + 2b; with b more, no more than n. It is
            restarted from its leading Ritz vectors when it is full.
        tol: stop when the estimated energy deficit 1 − ‖AV‖_F²/Σ_{i≤r}σᵢ² of every H is below it.
        steps: instead, so many steps; then b ≥ r and limit ≥ (steps + 1)·b.
        max_steps: give up after so many.
        check_every: steps that may pass without a look at whether they were enough.
        seed: of the sketch.
        start: (batch, n, b) instead of a sketch.
    """
    batch, _, n = operator.shape
    basis = torch.empty(batch, limit, n, dtype=torch.float32, device=operator.device)
    T = torch.zeros(batch, limit, limit, dtype=torch.float32, device=operator.device)  # its lower triangle
    progress = Progress(rank, tol, block, check_every)
    panel, deficient = orthonormalize(operator.sketch(block, seed) if start is None else start)
    doubtful = any(deficient)
    off_diagonal = basis.new_zeros(batch, 0, block)  # of the basis' last rows, all that H couples the panel to
    AQ_blocks: list[Tensor] = []  # A·Q, panel by panel, as far as it is known
    size = step = 0
    while True:
        old, size = size, size + block
        near = old - off_diagonal.shape[1]
        basis[:, old:size] = panel.mT
        T[:, old:size, near:old] = off_diagonal.mT
        if step == steps or step >= max_steps or progress.last_step:
            T[:, old:size, old:size], AQ = operator.compress(panel)
            values, vectors = torch.linalg.eigh(T[:, :size, :size])
            AQ_blocks += [] if AQ is None else [AQ]
            return _leading(basis, AQ_blocks, vectors, rank, _unresolved(T, values, old, rank))
        T[:, old:size, old:size], Z, AQ = operator.project(panel)
        AQ_blocks += [] if AQ is None else [AQ]
        panel, deficient = orthonormalize(Z, basis[:, :size], basis[:, near:size])
        doubtful = doubtful or any(deficient)
        off_diagonal = Z.mT @ panel
        step += 1
        full = size + block > limit
        if not full and (steps is not None or not progress.due(step, size)):
            continue
        values, vectors = torch.linalg.eigh(T[:, :size, :size])
        if steps is None:
            residuals = torch.linalg.vector_norm(off_diagonal.mT @ vectors[:, old:, -rank:], dim=1)
            unresolved = _unresolved(T, values, old, rank)
            missing = unresolved.missing(values[:, -rank:], residuals).tolist()
            if progress.look(step, max(missing), doubtful):
                return _leading(basis, AQ_blocks, vectors, rank, unresolved)
        if full:
            keep = min(2 * rank + block, limit - 2 * block)
            basis[:, :keep] = vectors[:, :, -keep:].mT @ basis[:, :size]
            T.zero_().diagonal(dim1=-2, dim2=-1)[:, :keep] = values[:, -keep:]
            off_diagonal = vectors[:, old:, -keep:].mT @ off_diagonal
            size = keep
            AQ_blocks.clear()


def _unresolved(T: Tensor, values: Tensor, old: int, rank: int) -> Unresolved:
    size = values.shape[-1]
    edge = torch.linalg.eigvalsh(T[:, old:size, old:size])[:, -1]
    return Unresolved(edge, values[:, max(0, size - rank - GUARD_VECTORS)])


def _leading(basis: Tensor, AQ_blocks: list[Tensor], vectors: Tensor, rank: int, unresolved: Unresolved) -> Subspace:
    size = vectors.shape[-1]
    wanted = vectors[:, :, -rank:]
    widths = [AQ.shape[-1] for AQ in AQ_blocks]
    AV = None
    if AQ_blocks and sum(widths) == size:
        first, *others = torch.split(wanted, widths, dim=1)
        AV = AQ_blocks[0] @ first
        for AQ, part in zip(AQ_blocks[1:], others, strict=True):  # to put A·Q together would take as long again
            AV.baddbmm_(AQ, part)
    return Subspace(basis[:, :size].mT @ wanted, AV, unresolved.missing)


class Progress:
    """Decides when to solve the projected eigenproblem, which at rank 128 costs as much as a step, and when to stop.

    Convergence accelerates: the pace of the last steps gives too many that remain, :data:`FASTEST` too few.

    Attributes:
        last_step: one more product with the next block will do.
    """

    def __init__(self, rank: int, tol: float, block: int, check_every: int) -> None:
        self.smallest_basis = rank + GUARD_VECTORS
        self.tol = tol
        self.check_every = check_every
        self.fastest = FASTEST ** min(1.0, block / rank)
        self.next_look = 3
        self.last_look: tuple[int, float] | None = None
        self.last_step = False

    def due(self, step: int, size: int) -> bool:
        """Whether to look after ``step`` steps, at a basis of ``size`` columns."""
        return step >= self.next_look and size >= self.smallest_basis

    def look(self, step: int, missing: float, doubtful: bool) -> bool:
        """Whether to stop at once.

        An invariant subspace has no residual, even where it is not the wanted one: a block finds no more than its
        columns' number of directions of one eigenvalue. The next panel is arbitrary then, and a basis that has it can
        tell: with wanted directions in it, the residual is large once more.

        Args:
            step: taken so far.
            missing: the worst estimate in the stack.
            doubtful: a subspace has been invariant, so that one look is not enough.
        """
        if missing <= self.tol:
            confirmed = self.last_look is not None and self.last_look[0] == step - 1 and self.last_look[1] <= self.tol
            self.last_look, self.next_look = (step, missing), step + 1
            return confirmed or not doubtful
        ratio = 1.0
        if self.last_look is not None and missing < self.last_look[1]:
            earlier, before = self.last_look
            ratio = (missing / before) ** (1 / (step - earlier))
        self.last_look = step, missing
        self.last_step = not doubtful and missing * max(ratio, self.fastest) <= self.tol / 2
        at_best = math.log(self.tol / missing) / math.log(self.fastest)
        at_this_pace = math.log(self.tol / missing) / math.log(ratio) if ratio < 1 else math.inf
        expected = math.sqrt(at_best * min(at_this_pace, 2 * at_best))
        # no look can be the last one before all but one of the steps that are needed at best; after these, check_every
        self.next_look = step + max(1, math.floor(at_best) - 1, min(self.check_every, math.floor(0.8 * expected)))
        return False
