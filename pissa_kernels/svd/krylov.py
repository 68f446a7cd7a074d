"""Block Krylov: the leading eigenvectors of H = AᵀA from a few products with H.

Block Lanczos with full reorthogonalization (Golub & Underwood 1977; for its accuracy from a random start Musco & Musco
2015, arXiv 1504.05477, and Tropp & Webber 2023, arXiv 2306.12418) and thick restart (Wu & Simon 2000). The basis Q
spans a subspace of A's smaller side. Each step multiplies the newest panel by H, which completes the projected matrix
T = QᵀHQ and yields the next panel. The last step needs only QᵀHQ, which takes one product with A instead of two.

Measured (``python -m bench engine``, and the same spectra on diagonal matrices):

- With blocks of b columns, an energy deficit of 1e-6 takes about 4r + 9b columns. Small blocks need fewer columns and
  more steps; which block is fastest depends on BLAS (:mod:`pissa_kernels.svd.cost`).
- A restart at 3.5r to 6r columns that keeps 2r costs a step or two and bounds the eigenproblem of T, which at 1000
  columns takes as long as five products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operators import Operator
from .orthogonalize import ROUNDOFF_LENGTH, orthonormalize
from .stopping import GUARD_VECTORS, StoppingRule, Subspace, UnresolvedSpectrum

# Checks that are repeated to tell single close values from a cluster. Each saves a second solution with a wider block
# where the values come apart, and costs two steps where they do not.
MOST_SEPARATIONS = 3


@functools.cache
def steps_for_niter(niter: int) -> int:
    """Number of Krylov steps that amplify every wanted direction as much as ``niter`` rounds of subspace iteration.

    With x = σᵢ²/σ_tail², N rounds of ``svd_lowrank`` amplify direction i relative to the tail by x^(N+1), and K steps
    from AᵀG by √x·T_K(2x−1), T_K the Chebyshev polynomial (Musco & Musco 2015, §4). For large x the first grows faster,
    so K is the smallest number for which the second is at least as large wherever subspace iteration leaves more than
    1e-9 of the tail's energy relative to the direction's.
    """
    ratios = torch.logspace(0, 6, 2000, dtype=torch.float64, device="cpu")[1:]
    subspace = 2 * (niter + 1) * ratios.log()
    unsettled = subspace < math.log(1e9)
    angle = torch.arccosh(2 * ratios - 1)
    steps = 1
    while True:
        # log T_K(cosh a) = log cosh(K·a), in a form that does not overflow
        chebyshev = steps * angle + torch.log1p(torch.exp(-2 * steps * angle)) - math.log(2)
        if bool((ratios.log() + 2 * chebyshev >= subspace)[unsettled].all()):
            return steps
        steps += 1


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
    """The leading eigenvectors of H.

    Args:
        operator: H, finite, scaled so that its square neither overflows nor underflows in float32.
        rank: r.
        block: b, columns of one block.
        limit: columns of the largest basis, at least r + GUARD_VECTORS + 2b; limit + b ≤ n. A full basis is restarted
            from its leading Ritz vectors.
        tol: tolerance on the estimated energy deficit 1 − ‖AV‖_F²/Σ_{i≤r}σᵢ².
        steps: number of steps if fixed, with b ≥ r and limit ≥ (steps + 1)·b; None to iterate to ``tol``.
        max_steps: number of steps after which the iteration stops in any case.
        check_every: largest number of steps between two convergence checks, unless more are certain to be needed.
        seed: seed of the sketch.
        start: (n, b) start block; None for a sketch.
    """
    basis = LanczosBasis(operator, block, limit)
    rule = StoppingRule(rank, tol, block, check_every)
    panel, rank_deficient = orthonormalize(operator.sketch(block, seed) if start is None else start)
    step = separations = 0
    last = max_steps if steps is None else min(steps, max_steps)
    while True:
        if step >= last or rule.last_step:
            basis.append(panel)
            basis.complete(*operator.compress(panel))
            values, vectors = basis.eigh()
            return basis.leading(vectors, rank, basis.unresolved(values, rank))
        room = (limit - basis.size) // block
        until_check = room if steps is not None else rule.steps_to_check(step, basis.size)
        count = min(until_check, room, last - step)
        panel, deficient = basis.advance(panel, count)
        rank_deficient = rank_deficient or deficient
        step += count
        full = basis.size + block > limit
        if not full and (steps is not None or not rule.check_due(step, basis.size)):
            continue
        values, vectors = basis.eigh()
        if steps is None:
            unresolved = basis.unresolved(values, rank)
            pairs = values[-rank:].tolist(), basis.residuals(vectors[:, -rank:]).tolist()
            stops = rule.should_stop(step, unresolved.deficit(*pairs), rank_deficient)
            if (stops or rule.last_step) and separations < MOST_SEPARATIONS and unresolved.hidden(*pairs) > tol:
                # single close values come apart in a few steps; of a cluster, only a wider block sees enough
                stops, separations = False, separations + 1
                rule.put_off(step)
            if stops:
                return basis.leading(vectors, rank, unresolved)
        if full:
            basis.restart(values, vectors, keep=min(2 * rank + block, limit - 2 * block))


class LanczosBasis:
    """Orthonormal basis Q of a block Krylov subspace, and T = QᵀHQ.

    Attributes:
        operator: H.
        block: columns of a panel.
        rows: (limit, n) Qᵀ in its first ``size`` rows.
        T: (limit, limit), lower triangle.
        size: columns of Q.
        newest: index of the first column of the newest panel.
        off_diagonal: (k, b) off-diagonal block of T between the last k columns of Q and the next panel; T is zero
            between the columns before these and the panel.
        image: (limit, m) (A·Q)ᵀ in its first ``size`` rows; None after a restart, and where the products with H do not
            compute it.
    """

    def __init__(self, operator: Operator, block: int, limit: int) -> None:
        m, n = operator.shape
        self.operator = operator
        self.rows = torch.empty(limit, n, dtype=torch.float32, device=operator.device)
        self.T = torch.zeros(limit, limit, dtype=torch.float32, device=operator.device)
        self.block = block
        self.size = self.newest = 0
        self.off_diagonal = self.rows.new_zeros(0, block)
        self.image = self.rows.new_empty(limit, m) if operator.gives_image else None

    def append(self, panel: Tensor) -> None:
        """Append a panel (n, b), and its off-diagonal block to T."""
        self._grow(panel.shape[1])
        self.rows[self.newest : self.size] = panel.mT
        self.T[self.newest : self.size, self._first_coupled() : self.newest] = self.off_diagonal.mT

    def complete(self, matrix: Tensor, AQ: Tensor | None) -> None:
        """Complete T with PᵀHP (b, b) of the newest panel P, and keep A·P if it is known."""
        self.T[self.newest : self.size, self.newest : self.size] = matrix
        if self.image is not None and AQ is not None:
            self.image[self.newest : self.size] = AQ.mT

    def advance(self, panel: Tensor, count: int) -> tuple[Tensor, bool]:
        """``count`` times: append the panel and replace it by the next one. One call of csrc where it has the products.

        Returns:
            The next panel, and whether one of these was rank-deficient.
        """
        rank_deficient, body = False, self.operator.lanczos()
        while count:
            if body is None:
                self.append(panel)
                panel, deficient = self.next_panel(panel)
                made = 1
            else:
                panel, deficient, made = self._advance_by(body, panel, count)
            rank_deficient, count = rank_deficient or deficient, count - made
        return panel, rank_deficient

    def _advance_by(self, body: Callable[..., Any], panel: Tensor, count: int) -> tuple[Tensor, bool, int]:
        result, coupling, figures = body(panel, self.off_diagonal, self.rows, self.image, self.T, self.size, count)
        steps, kept, is_resolved = figures.tolist()
        made, couplings = int(steps), len(self.off_diagonal)
        for _ in range(made):
            self._grow(panel.shape[1])
        if is_resolved:
            self.off_diagonal = coupling
            return result, kept <= ROUNDOFF_LENGTH, made
        near = self.newest - (self.block if made > 1 else couplings)
        next_panel, deficient = orthonormalize(result, self.rows[: self.size], near)
        self.off_diagonal = result.mT @ next_panel
        return next_panel, deficient or kept <= ROUNDOFF_LENGTH, made

    def next_panel(self, panel: Tensor) -> tuple[Tensor, bool]:
        """Complete T with the newest panel, and orthonormalize H·panel against Q.

        Returns:
            The next panel, and whether H·panel was rank-deficient against Q.
        """
        matrix, HQ, AQ = self.operator.project(panel)
        self.complete(matrix, AQ)
        panel, deficient = orthonormalize(HQ, self.rows[: self.size], near=self._first_coupled())
        self.off_diagonal = HQ.mT @ panel
        return panel, deficient

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Ritz values (size,), ascending, and their vectors (size, size) in the basis Q."""
        values, vectors = torch.linalg.eigh(self.T[: self.size, : self.size])
        return values, vectors

    def residuals(self, vectors: Tensor) -> Tensor:
        """‖H·v − θ·v‖ (k,) of the Ritz vectors v = Q·z, z the columns of ``vectors`` (size, k)."""
        norms: Tensor = torch.linalg.vector_norm(self.off_diagonal.mT @ vectors[self.newest :], dim=0)
        return norms

    def unresolved(self, values: Tensor, rank: int) -> UnresolvedSpectrum:
        """What is known of the unresolved spectrum, from the Ritz values (size,) and the newest panel."""
        newest = self.T[self.newest : self.size, self.newest : self.size]
        edge = float(torch.linalg.eigvalsh(newest)[-1])
        guard_value = float(values[max(0, self.size - rank - GUARD_VECTORS)])
        others = max(self.block, GUARD_VECTORS) - 1
        following = values[max(0, self.size - rank - others) : self.size - rank].tolist()
        return UnresolvedSpectrum(edge, guard_value, following[::-1], self.block)

    def leading(self, vectors: Tensor, rank: int, unresolved: UnresolvedSpectrum) -> Subspace:
        """The ``rank`` leading Ritz vectors, with A·V where ``image`` is known."""
        wanted = vectors[:, -rank:]
        AV = None if self.image is None else self.image[: self.size].mT @ wanted
        return Subspace(self.rows[: self.size].mT @ wanted, AV, unresolved.deficit, unresolved.hidden)

    def restart(self, values: Tensor, vectors: Tensor, keep: int) -> None:
        """Replace Q by its ``keep`` leading Ritz vectors (thick restart, Wu & Simon 2000)."""
        kept = vectors[:, -keep:]
        self.rows[:keep] = kept.mT @ self.rows[: self.size]
        self.T.zero_().diagonal()[:keep] = values[-keep:]
        self.off_diagonal = kept[self.newest :].mT @ self.off_diagonal
        self.size = keep
        self.image = None  # rounding errors of A·Q would add up

    def _grow(self, columns: int) -> None:
        self.newest, self.size = self.size, self.size + columns

    def _first_coupled(self) -> int:
        return self.newest - len(self.off_diagonal)
