"""truncated_svd against float64: energies, triplets, certificates, difficult matrices."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pissa_kernels as pk
from pissa_kernels.svd import cost
from pissa_kernels.svd import driver as svd
from pissa_kernels.svd.cost import SolverPlan
from pissa_kernels.svd.weight_operator import WeightOperator

from ..support.reference import (
    EPS,
    KINDS,
    check_triplets,
    energy_deficit,
    matrix,
    optimal_energies,
    real_weights,
    realistic,
    true_residual,
    with_spectrum,
)


def try_first(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Try a method before all others, whichever is the fastest on this CPU."""

    def choose(*arguments: Any, exclude: Collection[str], **keywords: Any) -> cost.SolverPlan:
        others = () if method in exclude else {"krylov", "chebyshev", "gram", "svd"} - {method}
        return cost.choose_plan(*arguments, exclude=[*exclude, *others], **keywords)

    monkeypatch.setattr(svd, "choose_plan", choose)


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("name", sorted(real_weights()))
def test_real_weights_to_tolerance(name: str, rank: int) -> None:
    W = real_weights()[name]
    result = pk.truncated_svd(W, rank)
    check_triplets(W, rank, result)
    assert result.certificate.converged
    assert energy_deficit(W, result.Vh) <= 1e-6, "the default tolerance"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1536, 1536), (3000, 1100), (1100, 3000)])
def test_krylov_on_realistic_weights(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_first("krylov", monkeypatch)
    W = realistic(*shape).to(dtype)
    result = pk.truncated_svd(W, 16)
    assert result.certificate.method == "krylov"
    check_triplets(W, 16, result)
    assert energy_deficit(W, result.Vh) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("niter", [0, 1, 2, 4, 16])
def test_niter_is_no_less_accurate_than_svd_lowrank(niter: int) -> None:
    """On every real weight, and on spectra that favor one method or the other."""
    n = 420
    index = torch.arange(n, dtype=torch.float64)
    spectra = {
        "geometric": 0.9**index,
        "steep": 0.5**index,
        "power": (index + 1) ** -0.5,
        "flat": torch.ones(n),
        "step at r": torch.where(index < 16, 1.0, 0.3),
        "step before r": torch.where(index < 10, 1.0, 0.9),
        "cluster across r": torch.where(index < 30, 1.0, 0.2),
        "one large": torch.where(index < 1, 1.0, 1e-3),
    }
    matrices = {name: with_spectrum(600, n, s, seed=7).float() for name, s in spectra.items()} | real_weights()
    torch.manual_seed(0)  # svd_lowrank draws from the global generator
    for name, W in matrices.items():
        energies = optimal_energies(W)
        for rank in (4, 16, 64):
            ours = pk.truncated_svd(W, rank, niter=niter)
            check_triplets(W, rank, ours)
            theirs = torch.svd_lowrank(W, rank, niter=niter)[2].mT
            # rounding W to float32 splits equal singular values by more than this
            slack = EPS / 16
            assert energy_deficit(W, ours.Vh, energies) <= energy_deficit(W, theirs, energies) + slack, (name, rank)


@pytest.mark.parametrize("niter", [4, 16])
def test_niter_takes_fewer_products_than_that_many_rounds(niter: int) -> None:
    result = pk.truncated_svd(realistic(1536, 768).bfloat16(), 16, niter=niter)
    # including the two that turn the subspace into triplets and measure their residuals
    assert result.certificate.passes <= 2 * niter + 2


@settings(max_examples=150, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    fraction=st.floats(0, 1),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    niter=st.sampled_from([None, 0, 4]),
    seed=st.integers(0, 99),
)
def test_any_small_matrix(
    m: int, n: int, fraction: float, kind: str, dtype: torch.dtype, niter: int | None, seed: int
) -> None:
    W = matrix(kind, m, n, seed).to(dtype)
    rank = 1 + int(fraction * (min(m, n) - 1))
    result = pk.truncated_svd(W, rank, niter=niter, seed=seed)
    check_triplets(W, rank, result)
    assert energy_deficit(W, result.Vh) <= 1e-6 if W.any() else True


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_is_met_with_fewer_passes_if_it_is_looser(
    tol: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_first("krylov", monkeypatch)
    W = realistic(1500, 1200).to(dtype)
    passes = []
    for requested in (tol, tol / 1e3):
        result = pk.truncated_svd(W, 8, tol=requested)
        assert result.certificate.method == "krylov"
        assert result.certificate.converged
        assert energy_deficit(W, result.Vh) <= requested + 1e-13
        passes.append(result.certificate.passes)
    assert passes[0] < passes[1]


def test_a_failed_eigensolver_falls_back_to_a_dense_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    W = realistic(1200, 1200).float()
    monkeypatch.setattr(svd, "block_krylov", fail)
    monkeypatch.setattr(svd, "chebyshev_subspaces", fail)
    monkeypatch.setattr(WeightOperator, "chebyshev", fail)
    result = pk.truncated_svd(W, 16)
    assert result.certificate.method == "gram"
    check_triplets(W, 16, result)


def test_a_failed_eigensolver_of_a_dense_method_falls_back_to_the_full_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = []

    def fail(_: object, __: int, dtype: torch.dtype) -> None:
        failed.append(dtype)
        raise torch.linalg.LinAlgError("did not converge")

    W = realistic(300, 200).float()
    monkeypatch.setattr(svd, "choose_plan", lambda *_, **__: SolverPlan("gram", 0.0))
    assert pk.truncated_svd(W, 16).certificate.method == "gram"
    monkeypatch.setattr(svd, "gram_triplets", fail)
    result = pk.truncated_svd(W, 16)
    assert failed == [torch.float32, torch.float64]
    assert result.certificate.method == "svd"
    check_triplets(W, 16, result)


@pytest.mark.parametrize("shape", [(300, 200), (96, 384), (384, 384), (1024, 300)])
@pytest.mark.parametrize("kind", ["rows", "columns", "corner", "entries"])
def test_weights_with_fewer_nonzero_rows_or_columns_than_the_rank(kind: str, shape: tuple[int, int]) -> None:
    """Products with vectors of the null space are exactly zero, and stand before the others."""
    for left in range(1, 8):
        generator = torch.Generator().manual_seed(left)
        values = torch.randn(*shape, generator=generator)
        rows, columns = (torch.randperm(size, generator=generator)[:left] for size in shape)
        W = torch.zeros(shape)
        if kind == "rows":
            W[rows] = values[rows]
        elif kind == "columns":
            W[:, columns] = values[:, columns]
        elif kind == "corner":
            W[:left, :left] = values[:left, :left]
        else:
            W[rows, columns] = values[rows, columns]
        result = pk.truncated_svd(W, 16)
        check_triplets(W, 16, result)
        assert result.certificate.energy >= 1 - 1e-5, "the rank of the weight is below 16"
        assert result.certificate.residual <= 1e-5


@pytest.mark.parametrize("shape", [(5, 5), (96, 40), (300, 700)])
@pytest.mark.parametrize("scale", [2.0**-130, 2.0**-140, 2.0**-146])
def test_the_certificate_counts_the_rounding_of_subnormal_singular_values(shape: tuple[int, int], scale: float) -> None:
    W = (realistic(*shape) * scale / realistic(*shape).abs().max()).float()
    U, S, Vh, certificate = pk.truncated_svd(W, 2)
    assert 0 < S[1] < torch.finfo(torch.float32).smallest_normal
    assert true_residual(W, U, S, Vh) <= certificate.residual * float(S[0])


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("shape", [(600, 500), (40, 30)])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.bfloat16, 2.0**120),
        (torch.bfloat16, 2.0**-115),
        (torch.float32, 2.0**118),
        (torch.float32, 2.0**-120),
        (torch.float16, 2.0**13),
        (torch.float16, 2.0**-10),
    ],
)
def test_weights_at_the_ends_of_the_range_of_their_dtype(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, scale: float
) -> None:
    W = realistic(*shape)
    W = (W / W.abs().max() * scale).to(dtype)
    result = pk.truncated_svd(W, rank)
    check_triplets(W, rank, result)
    assert result.certificate.converged
    assert energy_deficit(W, result.Vh) <= 1e-6


def test_singular_values_beyond_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="exceed float32's range"):
        pk.truncated_svd(torch.full((8, 8), 3e38), 1)


def test_layouts_and_flags_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # A·V as block Krylov computes it on the way has a longer sum's round-off
    try_first("chebyshev", monkeypatch)
    W = realistic(500, 600).float()
    expected = pk.truncated_svd(W, 8)
    wide = W.new_zeros(1000, 700)
    wide[::2, 50:650] = W
    views = [W.mT.contiguous().mT, wide[::2, 50:650], W.clone().requires_grad_(), torch.nn.Parameter(W.clone())]
    for view in views:
        result = pk.truncated_svd(view, 8)
        assert not result.U.requires_grad
        torch.testing.assert_close(result.S, expected.S, rtol=4 * EPS, atol=0)
    expanded = torch.linspace(1, 2, 300).expand(200, 300)
    check_triplets(expanded, 3, pk.truncated_svd(expanded, 3))


@pytest.mark.parametrize(
    ("shape", "method"), [((60, 50), "svd"), ((200, 150), "gram"), ((500, 600), "chebyshev"), ((1300, 1400), "krylov")]
)
def test_ambient_modes_do_not_change_the_answer(
    shape: tuple[int, int], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_first(method, monkeypatch)
    W = realistic(*shape).bfloat16()
    expected = pk.truncated_svd(W, 8)
    assert expected.certificate.method == method

    def same() -> None:
        result = pk.truncated_svd(W, 8)
        assert torch.equal(result.U, expected.U)
        assert torch.equal(result.S, expected.S)
        assert torch.equal(result.Vh, expected.Vh)
        assert not result.U.is_inference()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        same()
    with torch.inference_mode():
        same()
    with torch.device("meta"):
        same()
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        same()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


def test_equal_seeds_give_equal_bits_without_the_global_generator() -> None:
    W = realistic(600, 500).bfloat16()
    state = torch.get_rng_state()
    first, again, other = (pk.truncated_svd(W, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.U, again.U)
    assert not torch.equal(first.U, other.U)
    assert (first.S - other.S).abs().max() <= 1e-5 * first.S[0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight": torch.ones(4, 5), "rank": 5}, ValueError, r"\(4, 5\).*1 ≤ r ≤ 4, got r=5"),
        ({"weight": torch.ones(4, 5), "rank": 0}, ValueError, "got r=0"),
        ({"weight": torch.ones(4, 5, 6), "rank": 1}, ValueError, "must be 2-D"),
        ({"weight": torch.ones(0, 5), "rank": 1}, ValueError, "empty"),
        ({"weight": torch.ones(4, 5).double(), "rank": 1}, TypeError, "Please initialize PiSSA under float32"),
        ({"weight": torch.ones(4, 5).to(torch.int8), "rank": 1}, TypeError, "torch.int8"),
        ({"weight": torch.tensor([[1.0, math.nan]]), "rank": 1}, ValueError, "NaN"),
        ({"weight": torch.tensor([[1.0, math.inf]]), "rank": 1}, ValueError, "Inf"),
        ({"weight": torch.tensor([[1.0, -math.inf], [math.inf, 1.0]]).half(), "rank": 1}, ValueError, "NaN|Inf"),
        ({"weight": torch.ones(4, 5, device="meta"), "rank": 1}, ValueError, "meta"),
        ({"weight": torch.ones(4, 5), "rank": 1, "tol": 0.0}, ValueError, "tol"),
        ({"weight": torch.ones(4, 5), "rank": 1, "niter": -1}, ValueError, "niter"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, error: type[Exception], words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=words):
        pk.truncated_svd(**arguments)
