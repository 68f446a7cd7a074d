"""Block Krylov: the leading right singular subspace of a tall matrix from a few products with it.

Block Lanczos on AᵀA with full reorthogonalisation (Golub & Underwood 1977; for its accuracy from a random start
Musco & Musco 2015, Tropp & Webber 2023, arXiv 2306.12418). The basis is built on the smaller side only. Each step
multiplies the newest block by A, which completes the projection T = QᵀAᵀAQ, and then by Aᵀ, which yields the next
block; so the last step needs one product and not two. The start is AᵀG for a Gaussian G, half a power step for one
product.

Measured on a 4096×4096 bf16 weight (power law and Gaussian bulk), rank 16: an energy deficit of 7e-4, 1.3e-5 and
1.4e-7 after 9, 11 and 13 products, where ``torch.svd_lowrank`` has 3e-3 after 10 and 6e-4 after 34.
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
        missing: estimated energy deficit, ``inf`` where there were too few steps for an estimate.
        beyond: the Ritz value of AᵀA some places after the last wanted one, which tells a cluster from a decay.
    """

    V: Tensor
    missing: float
    beyond: float


# How far after the last wanted Ritz value ``Subspace.beyond`` is read. A chance neighbour of σ_r is no cluster.
BEYOND = 8


def block_size(rank: int, niter: int | None) -> int:
    """Columns of one block.

    A block as wide as the rank contains a component of each wanted vector from the start, which is what a promise about
    N rounds of subspace iteration rests on. To a tolerance, blocks half as wide and twice as many steps reach the same
    accuracy with fewer columns in total (rank 128 at 4096²: 1.5e-7 after 20 products with 64 columns, 2.2e-7 after 15
    with 136, at 0.7 of the time).
    """
    if niter is None and rank > 64:
        return -(-rank // 16) * 8
    return rank + 8


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


def block_krylov(
    operator: Operator, rank: int, *, tol: float, niter: int | None, max_products: int, seed: int
) -> Subspace:
    """The leading right singular subspace of A, and an estimate of what it lacks.

    Args:
        operator: A, finite, scaled so that ‖A‖_F⁴ neither overflows nor vanishes in float32.
        rank: r, with ``basis_size + block_size ≤ n``.
        tol: stop when the estimated energy deficit 1 − ‖AV‖_F²/Σ_{i≤r}σᵢ² is below it (ignored with ``niter``).
        niter: instead, do what N rounds of subspace iteration would achieve on any matrix.
        max_products: give up after about so many products; the estimate then says how far it came.
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
    size, step, products = 0, 0, 1
    captured: list[float] = []
    while True:
        old, size = size, size + block
        basis[old:size] = panel.mT
        Y = operator.apply(panel)
        T[:old, old:size] = coupling
        T[old:size, :old] = coupling.mT
        T[old:size, old:size] = Y.mT @ Y
        products += 1
        if deficient:
            captured.clear()  # what an arbitrary block brings shows a step later: that pause is not the end
        if size >= rank and (steps is None or step >= steps - 4):
            captured.append(_captured_energy(T[:size, :size], rank))
        missing = estimated_deficit(captured)
        if products >= max_products or (missing <= tol if steps is None else step >= steps):
            break
        Z = operator.adjoint(Y)
        products += 1
        panel, deficient = orthonormalize(Z, basis[:size])
        coupling = torch.cat([basis.new_zeros(old, block), Z.mT @ panel])
        if size + block > limit:
            size, coupling = _restart(basis[:size], T, coupling, keep=rank + block // 2)
        step += 1
    values, vectors = torch.linalg.eigh(T[:size, :size])
    beyond = float(values[max(0, size - rank - BEYOND)])
    return Subspace(basis[:size].mT @ vectors[:, -rank:], missing, beyond)


def estimated_deficit(captured: list[float]) -> float:
    """Share of the energy still to be gained, from what the last steps captured; ``inf`` before the fourth.

    Gains G fall at least geometrically, so what is left after the last is at most G·R/(1−R) with R the ratio of the
    last two: an overestimate, because Krylov convergence is superlinear. Gains are taken over two steps each: between
    two clusters of singular values every other step gains nothing, and a single small gain means nothing.
    """
    if len(captured) < 4:
        return math.inf
    last, middle, first = captured[-1], captured[-3], captured[max(-5, -len(captured))]
    noise = 4 * torch.finfo(torch.float32).eps * last  # of energies that were summed in float32
    gain, before = last - middle, middle - first
    if gain <= noise:
        return 0.0 if last <= 0 else noise / last
    ratio = gain / before if before > 0 else math.inf
    return math.inf if ratio >= 1 else gain * ratio / (1 - ratio) / last


def _captured_energy(T: Tensor, rank: int) -> float:
    return float(torch.linalg.eigvalsh(T)[-rank:].clamp(min=0).double().sum())


def _restart(basis: Tensor, T: Tensor, coupling: Tensor, keep: int) -> tuple[int, Tensor]:
    """Compress a full basis to its leading Ritz vectors (thick restart, Wu & Simon 2000), in place."""
    values, vectors = torch.linalg.eigh(T[: len(basis), : len(basis)])
    vectors = vectors[:, -keep:]
    basis[:keep] = vectors.mT @ basis
    T.zero_()
    T.diagonal()[:keep] = values[-keep:]
    return keep, vectors.mT @ coupling
