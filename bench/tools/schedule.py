"""Run the GPU's fixed schedule on weights of known spectrum and print its energy deficit, without a GPU.

The code is the package's own, on a weight W = P·diag(σ)·Qᵀ that is never formed: P and Q are Hartley transforms with
random signs, so that products take O(n log n) and σ is exact. Panels are rounded to bfloat16 pieces as on a GPU. The
estimate is held against the exact deficit: the exit status is 1 where a weight counts as converged and is not, or where
the estimate is below the deficit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from pissa_kernels.factors import tolerance
from pissa_kernels.ops import batched_reference, dispatch
from pissa_kernels.ops.batched import Panel, Weights
from pissa_kernels.svd import fixed

from .. import commands
from ..initializers.spectra import leading_values, minilm_file

RANKS = (8, 16, 32, 64, 128, 256)
SOURCES = {
    "query": "encoder.layer.0.attention.self.query.weight",
    "value": "encoder.layer.2.attention.self.value.weight",
    "intermediate": "encoder.layer.3.intermediate.dense.weight",
    "output": "encoder.layer.5.output.dense.weight",
}
# Factors of σ₁: outliers drown a panel's other directions in its rounding.
OUTLIERS = (1, 4, 10)
TOL = tolerance(torch.bfloat16)
# Strides of the stand-in for the weight, which tell it from its transpose.
STRIDES = (1, 0)
# Deficits below are round-off of the estimate's float32 products.
ROUNDOFF = 1e-9


class Spectral:
    """W = P·diag(σ)·Qᵀ (n, n), P and Q orthogonal and fast."""

    def __init__(self, sigma: Tensor, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sigma = sigma
        self.signs = (torch.randint(0, 2, (2, len(sigma)), generator=generator) * 2 - 1).float()

    def apply(self, X: Tensor, transposed: bool) -> Tensor:
        """W·X or Wᵀ·X (n, k)."""
        first, second = self.signs if transposed else self.signs.flip(0)
        rows: Tensor = second * hartley(self.sigma.float() * hartley(first * X.mT))
        return rows.mT.contiguous()

    def deficit(self, V: Tensor) -> float:
        """Exact energy deficit of the span of V (n, r)."""
        basis = torch.linalg.qr(hartley(self.signs[1] * V.mT).double().mT)[0]
        energies = self.sigma.double().square()
        return float(1 - (energies @ basis.square()).sum() / energies[: V.shape[1]].sum())


def hartley(X: Tensor) -> Tensor:
    """The discrete Hartley transform along the last dimension: orthogonal, and its own inverse."""
    transform: Tensor = torch.fft.fft(X)
    return (transform.real - transform.imag) / math.sqrt(X.shape[-1])


def bodies(weight: Spectral) -> SimpleNamespace:
    """The operations on a batch of this one weight."""

    def product(left: Weights | Tensor, right: Panel | Tensor, *, precision: int, **options: Any) -> Panel:
        if not isinstance(left, Weights):
            return batched_reference.product(left, right, precision=precision, **options)
        assert isinstance(right, Panel)
        assert right.pieces is not None
        X = right.pieces[:precision, 0].float().sum(0)
        transposed = left.tensors[0].stride() != STRIDES
        return batched_reference.finished(weight.apply(X, transposed)[None], **options)

    others = {name: getattr(batched_reference, name) for name in ("split", "inverse_cholesky", "eigh")}
    energy = weight.sigma.double().square().sum().reshape(1)
    return SimpleNamespace(product=product, sum_of_squares=lambda _: energy, **others)


class Outcome(NamedTuple):
    """What the schedule does with a spectrum.

    Attributes:
        first: exact deficit after the schedule.
        estimate: the deficit that it estimates then.
        deficit: exact deficit at the end, after further filters.
        converged: whether the certificate says that it is at most the tolerance.
        passes: number of products with W or Wᵀ.
    """

    first: float
    estimate: float
    deficit: float
    converged: bool
    passes: int

    @property
    def right(self) -> bool:
        """Whether the estimate is an upper one, or denies its triplets as NaN, and the certificate is not wrong."""
        estimated = math.isnan(self.estimate) or self.first <= self.estimate + ROUNDOFF
        return estimated and not (self.converged and self.deficit > TOL)


def outcome(sigma: Tensor, rank: int) -> Outcome:
    """Run the schedule on a square weight with singular values σ (n,), descending."""
    weight, n = Spectral(sigma), len(sigma)
    stand_in = torch.zeros(n, dtype=torch.bfloat16).as_strided((n, n), STRIDES)
    with mock.patch.object(dispatch, "bodies", return_value=bodies(weight)):
        with mock.patch.object(fixed, "FURTHER_ROUNDS", 0):
            first = fixed.solve([stand_in], rank, tol=TOL, seed=0)
        last = fixed.solve([stand_in], rank, tol=TOL, seed=0)
    certificate = last.figures[0].certificate(TOL)
    deficits = [weight.deficit(solution.V[0]) for solution in (first, last)]
    return Outcome(deficits[0], first.figures[0].deficit, deficits[1], certificate.converged, certificate.passes)


def spectra(n: int) -> Iterator[tuple[str, Tensor]]:
    """Singular values (n,) of the benchmarks' synthetic weights, with outliers too."""
    kinds = {kind: (kind, "") for kind in ("mix", "power", "flat")}
    if minilm_file() is not None:
        kinds |= {name: ("real-like", source) for name, source in SOURCES.items()}
    for name, (kind, source) in kinds.items():
        leading, edge = leading_values(n, kind, source=source) if kind != "flat" else (torch.zeros(0), 3.0)
        sigma = torch.cat([leading.double(), edge * bulk(n - len(leading))]).sort(descending=True).values
        for factor in OUTLIERS if name in SOURCES else (1,):
            outlier = sigma.clone()
            outlier[0] *= factor
            yield f"{name} × {factor}" if factor > 1 else name, outlier


def bulk(count: int) -> Tensor:
    """Quantiles of the singular values of a square Gaussian matrix, relative to the largest: a quarter circle."""
    grid = np.linspace(0, 1, 20001)
    distribution = 2 / math.pi * (np.arcsin(grid) + grid * np.sqrt(1 - grid**2))
    return torch.from_numpy(np.interp((np.arange(count) + 0.5) / max(1, count), distribution, grid))


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, "The exit status is 1 if a certificate is wrong or an estimate too low.")
    parser.add_argument("--size", type=int, default=4096, metavar="N", help="rows and columns (default: 4096)")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), metavar="R")
    arguments = parser.parse_args(argv)
    wrong = 0
    for rank in arguments.ranks:
        plan = fixed.schedule(arguments.size, rank) if 1 <= rank <= arguments.size else None
        if plan is None:
            parser.error(f"there is no schedule for rank {rank}; ranks are 1 to {max(fixed.SCHEDULES)}")
        rows = []
        for spectrum, sigma in spectra(arguments.size):
            found = outcome(sigma, rank)
            wrong += not found.right
            rows.append((spectrum, *found[:3], "yes" if found.converged else "no", found.passes))
        headers = ("spectrum", "deficit", "estimated", "after further filters", "converged", "passes")
        print(f"\nrank {rank}: {plan.width} columns, filters of degree {plan.degrees}")
        print(tabulate(rows, headers, floatfmt=".1e"), flush=True)
    return 1 if wrong else 0
