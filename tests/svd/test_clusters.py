"""Certificates of matrices whose singular values cluster, against float64.

A method sees few directions of a cluster at first, and their residuals are small although others are missing.
PISSA_KERNELS_CLUSTERS=N tries N matrices instead of a few.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.numerics import exact_arithmetic
from pissa_kernels.svd import cost, fixed, krylov
from pissa_kernels.svd import driver as svd
from pissa_kernels.svd.machines import MACHINES
from pissa_kernels.svd.weight_operator import WeightOperator

from ..support.reference import check_triplets, energy_deficit, matrix, optimal_energies, with_spectrum

MATRICES = int(os.environ.get("PISSA_KERNELS_CLUSTERS", "60"))
METHODS = ("krylov", "narrow krylov", "chebyshev", "chebyshev through the Gram matrix", "fixed")
# What the estimate may be short by in a cluster, and what float32 leaves of the weight's own energy.
SHORT, SLACK = 10, 3e-7


def force(patch: pytest.MonkeyPatch, method: str, block: int) -> None:
    """Choose ``method`` for every weight, then Krylov, and no dense method where these fit into the weight."""

    def forced(
        m: int, n: int, rank: int, *arguments: Any, exclude: Any = (), formed: bool = True, **keywords: Any
    ) -> cost.SolverPlan:
        wanted = "chebyshev" if "chebyshev" in method and "chebyshev" not in exclude else "krylov"
        plans = [plan for plan in cost.candidates(m, n, rank, *arguments, **keywords) if plan.method == wanted]
        if not plans:
            return cost.SolverPlan("svd", 0.0)
        plan = replace(min(plans, key=lambda plan: plan.seconds), through_gram="Gram" in method)
        limit = block * math.ceil(max(256, 4 * rank, rank + 8 + 2 * block) / block)
        if wanted == "krylov" != method and limit + block <= n:
            plan = replace(plan, block=block, limit=limit, check_every=1)
        return plan

    patch.setattr(svd, "choose_plan", forced)
    patch.setattr(svd, "DENSE_FALLBACK_WIDTH", 0)
    patch.setattr(
        fixed, "DEVICES", tuple(key for key in MACHINES if key.startswith("cpu")) if method == "fixed" else ()
    )


class Draw(random.Random):
    """Random matrices with clusters of about as many singular values as are wanted, or as a block has columns."""

    def between(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def size(self, rank: int, block: int) -> int:
        near = (block - 1, block, block + 1, block + 4, 2 * block, 2 * block + 3)
        return max(
            1, self.choice((*near, rank - 1, rank, rank + 1, rank + 4, rank + 8, rank + 9, 2 * rank, 4 * rank + 5))
        )

    def spectrum(self, n: int, rank: int, block: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        index = torch.arange(n, dtype=torch.float64)
        spread = self.choice((0.0, self.between(1e-8, 1e-2), self.between(1e-5, 3e-3)))

        def cluster(k: int) -> Tensor:
            return 1 + spread * torch.rand(k, generator=generator, dtype=torch.float64)

        level = self.choice((0.95, 0.7, 0.3, 0.05, 1e-3))
        tail = self.choice(
            (
                0 * index,
                self.between(1e-8, 1e-3) * cluster(n),
                level * (index + 1) ** -self.choice((0.1, 0.3, 0.6, 1.0)),
                level * self.choice((0.9, 0.97, 0.99)) ** index,
                level * (1 - index / n / 2),
            )
        )
        kind = self.choice(("one", "several", "after others", "stairs"))
        if kind == "one":
            parts = [cluster(self.size(rank, block))]
        elif kind == "several":
            parts, value = [], 1.0
            while sum(map(len, parts)) < min(n, 2 * rank + 20):
                parts.append(value * cluster(self.size(rank, block)))
                value *= self.choice((0.99, 0.9, 0.5, 0.1))
            tail = tail * value
        elif kind == "after others":
            others = self.randrange(rank + 1)
            parts = [1 + self.choice((0.05, 0.5, 5.0)) * torch.linspace(1, 0.1, others).double()]
            parts.append(cluster(self.size(rank, block)))
        else:
            step = self.choice((0.999, 0.99, 0.95, 0.8, 0.5))
            parts = [step ** (index // max(self.size(rank, block), 1)) * cluster(n)]
        return torch.cat([*parts, tail])[:n].sort(descending=True)[0]

    def matrices(self, count: int) -> Iterator[tuple[Tensor, int, int]]:
        """Weights, with a rank and the columns of a block."""
        for _ in range(count):
            n = int(self.between(64, 400))
            rank, block = min(round(self.between(1, 64)), n // 2), self.choice((8, 8, 16, 32))
            spectrum, dtype = self.spectrum(n, rank, block), self.choice((torch.float32, torch.bfloat16))
            m = int(n * self.choice((1, 1.4)))
            if self.random() < 0.5:
                W = with_spectrum(m, n, spectrum, self.randrange(2**31))
            else:
                W = torch.zeros(m, n)
                W.diagonal().copy_(spectrum)
            yield W.to(dtype), rank, block


def test_certificates_are_true_where_singular_values_cluster() -> None:
    draw = Draw(0)
    for number, (W, rank, block) in enumerate(draw.matrices(MATRICES)):
        energies = optimal_energies(W)
        for method in METHODS:
            tol, seed = draw.choice((1e-6, 2.5e-6, 1e-5, 1e-4)), draw.randrange(1000)
            with pytest.MonkeyPatch.context() as patch:
                force(patch, method, block)
                result = pk.truncated_svd(W, rank, tol=tol, seed=seed)
            if result.certificate.converged:
                deficit = energy_deficit(W, result.Vh, energies)
                assert deficit <= SHORT * tol + SLACK, (number, method, W.shape, W.dtype, rank, block, tol, seed)


@pytest.mark.parametrize("seed", range(6))
def test_a_cluster_of_which_a_narrow_block_has_seen_as_much_as_is_wanted(seed: int) -> None:
    """75 singular values within 1e-3; after three steps, blocks of 8 have found 16 directions of these."""
    W = matrix("low rank", 300, 300, 0).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "chebyshev through the Gram matrix", 8)
        result = pk.truncated_svd(W, 16, seed=seed)
    check_triplets(W, 16, result)


@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.float32, 3e-4), (torch.bfloat16, 3e-4), (torch.bfloat16, 1e-5), (torch.bfloat16, 0.0)]
)
@pytest.mark.parametrize("cluster", [17, 20, 24, 40])
def test_a_cluster_of_more_values_than_are_wanted(cluster: int, dtype: torch.dtype, spread: float) -> None:
    """Two steps with blocks of 8 see 16 of them."""
    others = 0.3 * torch.linspace(1, 0.5, 400 - cluster, dtype=torch.float64)
    spectrum = torch.cat([torch.linspace(1 + spread, 1, cluster, dtype=torch.float64), others])
    W = with_spectrum(450, 400, spectrum, seed=1).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "narrow krylov", 8)
        result = pk.truncated_svd(W, 16)
    assert result.certificate.converged
    check_triplets(W, 16, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sketch_is_not_taken_for_a_result(dtype: torch.dtype) -> None:
    """34 nonzero values and 32 columns: they span 8 directions of the leading 10, and no product shows the others."""
    spectrum = torch.cat([torch.linspace(1.0006, 1, 10), torch.linspace(0.9, 0.89, 24), torch.zeros(130)])
    W = with_spectrum(180, 180, spectrum, seed=0).to(dtype)
    for seed in range(4):
        with pytest.MonkeyPatch.context() as patch:
            force(patch, "chebyshev through the Gram matrix", 8)
            result = pk.truncated_svd(W, 8, seed=seed)
        check_triplets(W, 8, result)


def close_values() -> Tensor:
    """A dense spectrum in which the last three of 16 values are nearly equal."""
    spectrum = torch.exp(-torch.arange(280, dtype=torch.float64) / 60)
    spectrum[14:16] = spectrum[13] * torch.tensor([1 - 5e-4, 1 - 1e-3], dtype=torch.float64)
    return spectrum


def equal_values() -> Tensor:
    """Twice as many equal values as a block has columns, and others."""
    return torch.cat([torch.full((8,), 3.0), torch.linspace(2.0, 0.1, 200)])


@pytest.mark.parametrize(("spectrum", "hides"), [(close_values(), False), (equal_values(), True)])
def test_close_values_come_apart_and_a_cluster_does_not(
    spectrum: Tensor, hides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four columns at a time: a second solution with a wider block is for clusters, and costs three times as much."""

    def hidden(W: Tensor, most: int) -> bool:
        monkeypatch.setattr(krylov, "MOST_SEPARATIONS", most)
        operator = WeightOperator(W.float())
        with exact_arithmetic(torch.device("cpu")):
            subspace = krylov.block_krylov(
                operator, 16, block=4, limit=240, tol=2.5e-6, max_steps=200, check_every=8, seed=0
            )
            triplets, _ = svd._evaluated(operator, subspace, 16, 2.5e-6)
        return svd._hides_energy(subspace, triplets, 2.5e-6)

    most, weights = krylov.MOST_SEPARATIONS, [with_spectrum(360, 280, spectrum, seed) for seed in range(6)]
    assert any(hidden(W, 0) for W in weights)
    assert any(hidden(W, most) for W in weights) == hides
