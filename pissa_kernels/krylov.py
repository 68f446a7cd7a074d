"""Block Krylov: the leading right singular subspace of a tall matrix from a few products with it.

Block Lanczos on AᵀA with full reorthogonalisation (Golub & Underwood 1977; for its accuracy from a random start
Musco & Musco 2015, Tropp & Webber 2023, arXiv 2306.12418). The basis is built on the smaller side only. Each step
multiplies the newest block by A, which completes the projection T = QᵀAᵀAQ, and then by Aᵀ, which yields the next
block; so the last step needs one product and not two. The start is AᵀG for a Gaussian G, half a power step for one
product.

``python -m bench.run --suite init`` measures it: on a 4096×4096 bf16 weight (power law and Gaussian bulk), rank 16,
an energy deficit of 3.5e-7 in 0.6 of the time in which PEFT's ``pissa_niter_16`` comes to 1.9e-3.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .orthogonalize import orthonormalize


class Operator(Protocol):
    """A tall matrix A (m, n), m ≥ n, known by its products."""

    shape: tuple[int, int]
    device: torch.device

    def apply(self, X: Tensor) -> Tensor: ...

    def adjoint(self, Y: Tensor) -> Tensor: ...


class Subspace(NamedTuple):
    """What :func:`block_krylov` found.

    Attributes:
        V: (n, rank) float32, orthonormal: the leading Ritz vectors.
        beyond: the Ritz value of AᵀA some places after the last wanted one, for :func:`missing_energy`.
    """

    V: Tensor
    beyond: float


# How far after the last wanted Ritz value ``Subspace.beyond`` is read: a chance neighbour of σ_r is no cluster.
BEYOND = 8
# What the missing energy is expected to fall by in one step at the very best; a better ratio of two is not believed.
FASTEST = 0.02
# What r²/gap exceeds the missing energy by, at least, where singular values decay.
OVERESTIMATE = 3
# Below so many floating point operations a step costs less than the eigenproblem that would tell whether it is needed.
CHEAP_STEP = 2e8


def block_size(rank: int, niter: int | None) -> int:
    """Columns of one block.

    A block as wide as the rank contains a component of each wanted vector from the start, which is what a promise about
    N rounds of subspace iteration rests on. To a tolerance, blocks half as wide and twice as many steps reach the same
    accuracy with fewer columns in total. Whole multiples of 16, because a CPU's matrix product takes as long for 24
    columns as for 32.
    """
    wanted = rank // 2 if niter is None and rank > 64 else rank + 8
    return -(-wanted // 16) * 16


def steps_for_niter(niter: int) -> int:
    """Krylov steps that amplify every wanted direction as much as ``niter`` rounds of subspace iteration do.

    With x = σᵢ²/σ_tail², N rounds of ``svd_lowrank`` scale direction i against the tail by x^(N+1), K steps from AᵀG
    by √x·T_K(2x−1), T_K the Chebyshev polynomial (Musco & Musco 2015, §4). The first grows faster for large x, so K is
    the least for which it overtakes only where it has already pushed the tail's energy below 1e-9 of the direction's.
    """
    ratios = torch.logspace(0, 6, 2000, dtype=torch.float64, device="cpu")[1:]
    subspace = 2 * (niter + 1) * ratios.log()
    unsettled = subspace < math.log(1e9)
    steps = 1
    while True:
        angle = torch.arccosh(2 * ratios - 1)
        # log T_K(cosh a) = log cosh(K·a), written so that it does not overflow
        chebyshev = steps * angle + torch.log1p(torch.exp(-2 * steps * angle)) - math.log(2)
        if bool((ratios.log() + 2 * chebyshev >= subspace)[unsettled].all()):
            return steps
        steps += 1


def basis_size(rank: int, block: int, niter: int | None) -> int:
    """Columns of the largest basis that is built before a restart: about eight ranks, in whole blocks."""
    blocks = max(4, -(-8 * rank // block), -(-256 // block))
    if niter is not None:  # a restart would void the promise
        blocks = max(blocks, steps_for_niter(niter) + 1)
    return blocks * block


def missing_energy(energies: Tensor, residuals: Tensor, beyond: float) -> float:
    """Estimated share of Σθᵢ that the exact leading eigenvalues of AᵀA have beyond the Ritz values θᵢ.

    A Ritz pair with residual r lacks about r²/gap, the gap to the part of the spectrum that it is not yet separated
    from, and no more than about r where r exceeds the gap (Parlett 1998, §11.7). The gap is taken to a Ritz value some
    places after the wanted ones. Measured against fp64: one to three times too large where singular values decay, up to
    five times too small where hundreds of them agree to three digits.

    Args:
        energies: (r,) θᵢ.
        residuals: (r,) ‖AᵀA·vᵢ − θᵢ·vᵢ‖.
        beyond: the Ritz value that gaps are taken to.
    """
    energies, residuals = energies.double(), residuals.double()
    gaps = (energies - beyond).clamp(min=0) + residuals
    total = float(energies.clamp(min=0).sum())
    lacking = torch.where(gaps > 0, residuals.square() / gaps, 0.0)
    return float(lacking.sum()) / (OVERESTIMATE * total) if total > 0 else 0.0


def block_krylov(
    operator: Operator, rank: int, *, tol: float, niter: int | None, max_products: int, seed: int
) -> Subspace:
    """The leading right singular subspace of A.

    Args:
        operator: A, finite, scaled so that ‖A‖_F⁴ neither overflows nor vanishes in float32.
        rank: r, with ``basis_size + block_size ≤ n``.
        tol: stop when the estimated energy deficit 1 − ‖AV‖_F²/Σ_{i≤r}σᵢ² is below it (ignored with ``niter``).
        niter: instead, do what N rounds of subspace iteration would achieve on any matrix.
        max_products: give up after about so many products.
        seed: of the sketch, drawn on the CPU so that every device starts from the same one.
    """
    m, n = operator.shape
    block = block_size(rank, niter)
    limit = basis_size(rank, block, niter)
    steps = None if niter is None else steps_for_niter(niter)
    basis = torch.empty(limit, n, dtype=torch.float32, device=operator.device)
    T = torch.zeros(limit, limit, dtype=torch.float32, device=operator.device)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    sketch = torch.randn(m, block, generator=generator, dtype=torch.float32, device="cpu").to(operator.device)
    panel, deficient = orthonormalize(operator.adjoint(sketch))
    coupling = basis.new_zeros(0, block)  # Qᵀ·AᵀA·panel for the basis Q so far
    progress = Progress(rank, tol, pace=2 if 4 * m * n * block < CHEAP_STEP else 1)
    size, step, last = 0, 0, False
    while True:
        old, size = size, size + block
        basis[old:size] = panel.mT
        Y = operator.apply(panel)
        T[:old, old:size] = coupling
        T[old:size, :old] = coupling.mT
        T[old:size, old:size] = Y.mT @ Y
        if last:
            break
        was_deficient = deficient
        Z = operator.adjoint(Y)
        panel, deficient = orthonormalize(Z, basis[:size])
        coupling = torch.cat([basis.new_zeros(old, block), Z.mT @ panel])
        step += 1
        # An invariant subspace has no residual, even where it is not the wanted one: then the panel is arbitrary, and
        # only a basis that has it can tell.
        settled = not deficient or was_deficient
        last = step >= steps if steps is not None else settled and progress.one_more_step_is_enough(T, coupling, size)
        last = last or 2 * step + 2 >= max_products
        if size + block > limit:
            size, coupling = _restart(basis[:size], T, coupling, keep=rank + block // 2)
    values, vectors = torch.linalg.eigh(T[:size, :size])
    beyond = float(values[max(0, size - rank - BEYOND)])
    return Subspace(basis[:size].mT @ vectors[:, -rank:], beyond)


class Progress:
    """Decides when the step that comes next will be the last, with as few eigenproblems as it takes.

    Between two looks it lets as many steps pass as even the fastest convergence would need, and two where steps are
    cheaper than looks.
    """

    def __init__(self, rank: int, tol: float, pace: int) -> None:
        self.rank = rank
        self.tol = tol
        self.pace = pace
        self.step = 0
        self.due = 3
        self.last_look: tuple[int, float] | None = None

    def one_more_step_is_enough(self, T: Tensor, coupling: Tensor, size: int) -> bool:
        """Called after every step with the projection of AᵀA on the basis and its coupling to the next block."""
        self.step += 1
        if size < self.rank + BEYOND or self.step < self.due:
            return False
        values, vectors = torch.linalg.eigh(T[:size, :size])
        residuals = torch.linalg.vector_norm(coupling.mT @ vectors[:, -self.rank :], dim=0)
        missing = missing_energy(values[-self.rank :], residuals, float(values[size - self.rank - BEYOND]))
        ratio = 1.0
        if self.last_look is not None and missing < self.last_look[1]:
            step, before = self.last_look
            ratio = (missing / before) ** (1 / (self.step - step))
        self.last_look = self.step, missing
        if missing * max(ratio, FASTEST) <= self.tol:
            return True
        self.due = self.step + max(self.pace, int(math.log(self.tol / missing) / math.log(FASTEST)))
        return False


def _restart(basis: Tensor, T: Tensor, coupling: Tensor, keep: int) -> tuple[int, Tensor]:
    """Compress a full basis to its leading Ritz vectors (thick restart, Wu & Simon 2000), in place."""
    values, vectors = torch.linalg.eigh(T[: len(basis), : len(basis)])
    vectors = vectors[:, -keep:]
    basis[:keep] = vectors.mT @ basis
    T.zero_()
    T.diagonal()[:keep] = values[-keep:]
    return keep, vectors.mT @ coupling
