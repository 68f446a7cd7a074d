"""Triplets from those of a weight nearby, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pissa_kernels.svd.driver import solve_batch
from pissa_kernels.svd.result import TruncatedSVD
from pissa_kernels.svd.warm import WarmStart

from ..support.reference import (
    EPS,
    KINDS,
    energy_deficit,
    loss,
    matrix,
    realistic,
    singular_values,
    true_residual,
    with_spectrum,
)

TOL = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(120, 80), (80, 120), (96, 96)]


def cold(weight: Tensor, rank: int) -> TruncatedSVD:
    return solve_batch([weight], rank, tol=TOL, niter=None, seed=0)[0]


def gaussian(m: int, n: int, seed: int) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def neighbors(m: int, n: int, rank: int, noise: float, kind: str = "real") -> tuple[Tensor, Tensor]:
    """Two matrices, float64, with one part of the given rank, and noise of the given size relative to its σ_r."""
    U, S, Vh = torch.linalg.svd(realistic(m, n) if kind == "real" else matrix(kind, m, n, 0), full_matrices=False)
    leading = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    found = []
    for seed in (1, 2):
        drawn = gaussian(m, n, seed)
        found.append(leading + noise * S[rank - 1] / torch.linalg.matrix_norm(drawn, 2) * drawn)
    return found[0], found[1]


def check(weight: Tensor, rank: int, found: TruncatedSVD, tol: float = TOL) -> None:
    """What must hold of a certified result."""
    U, S, Vh, certificate = found
    m, n = weight.shape
    assert (U.shape, S.shape, Vh.shape) == ((m, rank), (rank,), (rank, n))
    assert all(t.dtype == torch.float32 and t.is_contiguous() and bool(t.isfinite().all()) for t in (U, S, Vh))
    assert (S[:-1] >= S[1:]).all()
    assert true_residual(weight, U, S, Vh) <= certificate.residual * float(S[0]) * (1 + 1e-3)
    exact = singular_values(weight)
    if exact[0] == 0:
        assert certificate.energy == 1
        return
    # round-off of AᵀA·x relative to σ²: float32's, or that of two bfloat16 pieces on a 16-bit weight
    pieces = EPS if weight.dtype == torch.float32 else 2.0**-16
    allowed = 20 * pieces * math.sqrt(rank) * float(exact[0] / exact[rank - 1])
    assert loss(Vh.mT) <= allowed
    assert loss(U) <= allowed
    if certificate.converged:
        # directions of a cluster across index r cannot be told from each other in one product
        cluster = exact[(exact / exact[rank - 1] - 1).abs() < 1e-2]
        unresolved = 2 * float(1 - cluster[-1] / cluster[0])
        assert energy_deficit(weight, Vh) <= 5 * tol + unresolved
        assert energy_deficit(weight.mT, U.mT) <= 5 * tol + unresolved
        share = float(exact[:rank].square().sum() / exact.square().sum())
        assert certificate.energy == pytest.approx(share, rel=2e-5 + unresolved)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_product_each_way_is_enough_near_by(shape: tuple[int, int], dtype: torch.dtype, noise: float) -> None:
    first, second = (weight.to(dtype) for weight in neighbors(*shape, 8, noise))
    start = WarmStart(cold(first, 8), seed=0)
    found = start.solve(second, TOL)
    check(second, 8, found)
    assert found.certificate.converged
    assert found.certificate.method == "warm"
    rounds, rest = divmod(found.certificate.passes, 3)
    assert rest == 0
    assert rounds <= {0.02: 1, 0.1: 2, 0.5: 5}[noise]
    again = start.solve(first, TOL)  # the subspace has followed
    check(first, 8, again)
    assert again.certificate.converged


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_certificate(shape: tuple[int, int], dtype: torch.dtype) -> None:
    first, second = (weight.to(dtype) for weight in neighbors(*shape, 8, 0.1))
    start = WarmStart(cold(first, 8), seed=0)
    found = start.solve(second, TOL, certify=False)
    assert found.certificate.passes == 2
    assert not found.certificate.converged
    assert found.certificate.residual == 0
    # one bfloat16 piece of each panel has a roundoff of 2⁻⁹
    assert energy_deficit(second, found.Vh) <= (1e-5 if dtype == torch.float32 else 3e-5)
    assert energy_deficit(second.mT, found.U.mT) <= (1e-5 if dtype == torch.float32 else 3e-5)
    measured = start.certificate(second, found, 1e-4)
    assert measured.converged
    assert true_residual(second, found.U, found.S, found.Vh) <= measured.residual * float(found.S[0]) * (1 + 1e-3)
    assert true_residual(second, found.U, found.S, found.Vh) >= 0.2 * measured.residual * float(found.S[0])
    share = float(found.S.double().square().sum() / second.double().square().sum())
    assert measured.energy == pytest.approx(share, rel=1e-6)
    stale = start.certificate(first, found, TOL)  # triplets of another weight
    assert not stale.converged
    assert stale.residual > 0.01


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_weights_of_extreme_scale(shape: tuple[int, int], scale: float) -> None:
    first, second = ((weight * scale).float() for weight in neighbors(*shape, 6, 0.1))
    start = WarmStart(cold(first, 6), seed=0)
    uncertified = start.solve(second, TOL, certify=False)
    assert start.certificate(second, uncertified, 1e-4).converged
    found = start.solve(second, TOL)
    assert found.certificate.converged
    check(second, 6, found)


@pytest.mark.parametrize("shape", [(120, 80), (80, 120)])
@pytest.mark.parametrize("kind", KINDS)
def test_spectra(kind: str, shape: tuple[int, int]) -> None:
    """Clusters across index r, zero singular values, and values far below float32's round-off."""
    exact = matrix(kind, *shape, seed=3)
    first = exact.float()
    second = (exact + 1e-4 * gaussian(*shape, 5) * exact.std()).float()
    for rank in (4, 40, 50, 79, 80):
        start = WarmStart(cold(first, rank), seed=0)
        for weight in (second, first):
            found = start.solve(weight, TOL)
            assert found.certificate.converged
            if kind in ("low rank", "zero", "ill-conditioned") and weight is first:
                assert found.U.isfinite().all()
                assert found.Vh.isfinite().all()
                if kind != "zero":
                    assert energy_deficit(weight, found.Vh) <= 5 * TOL
                continue
            check(weight, rank, found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_useless_subspace(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The triplets of a matrix that has nothing to do with this one."""
    for seed in range(3):
        first, second = realistic(*shape, seed=seed).to(dtype), realistic(*shape, seed=seed + 1).to(dtype)
        start = WarmStart(cold(first, 8), seed=0)
        found = start.solve(second, TOL)
        assert found.certificate.converged
        check(second, 8, found)
        assert start.solve(second, TOL).certificate.passes <= 6


def test_the_subspace_is_replaced_where_it_is_degenerate() -> None:
    first = with_spectrum(90, 60, torch.linspace(2, 1, 60)).float()
    start = WarmStart(cold(first, 6), seed=0)
    second = torch.zeros(90, 60)
    second[:, :30] = realistic(90, 30).float()  # half of the columns are 0
    found = start.solve(second, TOL)
    check(second, 6, found)
    start.block.zero_()  # A·X = 0
    found = start.solve(second, TOL)
    assert found.certificate.method != "warm"
    check(second, 6, found)
    assert start.block.any()
    assert start.solve(second, TOL).certificate.method == "warm"


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_below_the_round_off_of_the_products(dtype: torch.dtype) -> None:
    first, second = (weight.to(dtype) for weight in neighbors(96, 96, 8, 1e-5))
    start = WarmStart(cold(first, 8), seed=0)
    for weight in (second, first):
        found = start.solve(weight, TOL)
        assert found.certificate.converged
        check(weight, 8, found)


@pytest.mark.parametrize("factor", [3.0, 10.0, 100.0])
def test_a_new_direction_that_stands_out_is_found(factor: float) -> None:
    first = realistic(256, 256)
    U, S, Vh = torch.linalg.svd(first)
    second = (first + factor * S[7] * torch.outer(U[:, -1], Vh[-1])).float()  # orthogonal to the subspace
    start = WarmStart(cold(first.float(), 8), seed=0)
    found = start.solve(second, TOL)
    assert found.certificate.converged
    check(second, 8, found)


def test_equal_arguments_give_equal_bits() -> None:
    first, second = (weight.bfloat16() for weight in neighbors(120, 80, 8, 0.2))
    results = [WarmStart(cold(first, 8), seed=0).solve(second, TOL) for _ in range(2)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    first, second = (weight.float() for weight in neighbors(40, 30, 4, 0.2))
    second[2, 3] = value
    start = WarmStart(cold(first, 4), seed=0)
    for certify in (False, True):
        with pytest.raises(ValueError, match="the weight holds"):
            start.solve(second, TOL, certify=certify)
