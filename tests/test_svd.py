"""The engine against fp64: energies, triplets, certificates, awkward matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels import krylov, svd
from pissa_kernels.orthogonalize import orthonormalize

from .reference import energy_deficit, optimal_energies, real_weights, realistic, true_residual, with_spectrum

EPS = torch.finfo(torch.float32).eps


def check_triplets(W: Tensor, rank: int, result: pk.TruncatedSVD) -> None:
    """What must hold of any result on any matrix, converged or not."""
    U, S, Vh, certificate = result
    m, n = W.shape
    assert (U.shape, S.shape, Vh.shape) == ((m, rank), (rank,), (rank, n))
    assert all(t.dtype == torch.float32 and t.is_contiguous() and bool(t.isfinite().all()) for t in (U, S, Vh))
    assert (S[:-1] >= S[1:]).all()
    assert (S >= 0).all()
    identity = torch.eye(rank, dtype=torch.float64)
    assert (U.double().mT @ U.double() - identity).norm() <= 20 * EPS * math.sqrt(rank)
    assert (Vh.double() @ Vh.double().mT - identity).norm() <= 20 * EPS * math.sqrt(rank)
    exact = torch.linalg.svdvals(W.double())
    assert true_residual(W, U, S, Vh) <= certificate.residual * float(S[0]) * (1 + 1e-3)
    # a float32 product of length n is off by about √n·ε (Higham & Mary 2019), LAPACK's float32 SVD by some ε
    rounding = EPS * (16 + math.sqrt(max(m, n))) * exact[0]
    assert (S.double() - exact[:rank]).max() <= rounding, "no Ritz value exceeds its singular value"
    if exact[0] > 0:
        share = float(exact[:rank].square().sum() / exact.square().sum())
        assert certificate.energy <= share * (1 + 1e-5)
    if certificate.converged:
        # five tolerances is what the estimate may be short by in a cluster
        assert certificate.energy == 1 if exact[0] == 0 else energy_deficit(W, Vh) <= 5e-6


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("name", sorted(real_weights()))
def test_real_weights_to_tolerance(name: str, rank: int) -> None:
    W = real_weights()[name]
    result = pk.truncated_svd(W, rank)
    check_triplets(W, rank, result)
    assert result.certificate.converged
    assert energy_deficit(W, result.Vh) <= 1e-6, "the default tolerance"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(768, 768), (1536, 512), (512, 1536)])
def test_krylov_on_realistic_weights(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = realistic(*shape).to(dtype)
    result = pk.truncated_svd(W, 16)
    assert result.certificate.method == "krylov"
    check_triplets(W, 16, result)
    assert energy_deficit(W, result.Vh) <= 1e-6


@pytest.mark.parametrize("niter", [0, 1, 2, 4, 16])
def test_niter_is_no_less_accurate_than_svd_lowrank(niter: int) -> None:
    """On every real weight, and on spectra that favour one method or the other."""
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
            assert energy_deficit(W, ours.Vh, energies) <= energy_deficit(W, theirs, energies) + 1e-9, (name, rank)


def test_steps_for_niter_amplify_as_much_as_subspace_iteration() -> None:
    """Independently: T_K by its recurrence, on a grid of gaps, wherever the tail is not yet below 1e-9."""
    for niter in (0, 1, 2, 3, 4, 8, 16, 40):
        steps = krylov.steps_for_niter(niter)
        for x in torch.linspace(1.001, 40, 4000, dtype=torch.float64).tolist():
            before, value = 1.0, 2 * x - 1
            for _ in range(steps - 1):
                before, value = value, 2 * (2 * x - 1) * value - before
            if x ** (-2 * (niter + 1)) > 1e-9:
                assert math.sqrt(x) * value >= x ** (niter + 1) * (1 - 1e-9), (niter, x)


@pytest.mark.parametrize("niter", [4, 16])
def test_niter_costs_fewer_products_than_the_rounds_it_stands_for(niter: int) -> None:
    result = pk.truncated_svd(realistic(1536, 768).bfloat16(), 16, niter=niter)
    assert result.certificate.passes <= (12 if niter == 4 else 2 * niter + 2)


spectra = st.sampled_from(["gaussian", "geometric", "clustered", "low rank", "zero", "equal", "ill-conditioned"])


def matrix(kind: str, m: int, n: int, seed: int) -> Tensor:
    k = min(m, n)
    index = torch.arange(k, dtype=torch.float64)
    if kind == "gaussian":
        return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    spectrum = {
        "geometric": 0.8**index,
        "clustered": torch.where(index < k // 2 + 1, 2.0, 1.0),
        "low rank": torch.where(index < max(1, k // 4), 1.0, 0.0),
        "zero": torch.zeros(k),
        "equal": torch.ones(k),
        "ill-conditioned": torch.logspace(0, -12, k, dtype=torch.float64),
    }[kind]
    return with_spectrum(m, n, spectrum, seed)


@settings(max_examples=150, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    fraction=st.floats(0, 1),
    kind=spectra,
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


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(300, 420),
    n=st.integers(300, 420),
    rank=st.sampled_from([1, 2, 7, 16, 24]),
    kind=spectra,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    niter=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
)
def test_any_matrix_by_krylov(
    m: int, n: int, rank: int, kind: str, dtype: torch.dtype, niter: int | None, seed: int
) -> None:
    """The Krylov path itself, whatever the cost model would choose and with no dense method to fall back to."""
    W = matrix(kind, m, n, seed).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svd, "choose_method", lambda *_, **__: "krylov")
        patch.setattr(svd, "CHEAP_GRAM", 0)
        result = pk.truncated_svd(W, rank, niter=niter, seed=seed)
    assert result.certificate.method == "krylov"
    check_triplets(W, rank, result)


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_is_met_and_not_by_much(tol: float, dtype: torch.dtype) -> None:
    W = realistic(900, 700).to(dtype)
    passes = []
    for requested in (tol, tol / 1e3):
        result = pk.truncated_svd(W, 8, tol=requested)
        assert result.certificate.method == "krylov"
        assert result.certificate.converged
        assert energy_deficit(W, result.Vh) <= requested + 1e-13
        passes.append(result.certificate.passes)
    assert passes[0] < passes[1]


def test_restarts_still_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    W = realistic(600, 600).float()
    monkeypatch.setattr(krylov, "basis_size", lambda rank, block, niter: 4 * block)
    monkeypatch.setattr(svd, "choose_method", lambda *_, **__: "krylov")
    monkeypatch.setattr(svd, "CHEAP_GRAM", 0)
    result = pk.truncated_svd(W, 16)
    assert result.certificate.converged
    assert result.certificate.passes > 2 * 4 + 3, "no restart was needed: the test shows nothing"
    check_triplets(W, 16, result)


def test_a_flat_spectrum_is_not_called_converged_by_krylov(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(1200, 1200, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(svd, "MAX_PRODUCTS", 12)
    result = pk.truncated_svd(W, 16)
    assert not result.certificate.converged
    assert energy_deficit(W, result.Vh) > 1e-6
    check_triplets(W, 16, result)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("below", [0.9, 0.05])
@pytest.mark.parametrize("rank", [1, 16])
def test_a_cluster_is_not_mistaken_for_convergence(
    spread: float, below: float, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 values that nearly agree: the energy stops growing long before it has been found."""
    monkeypatch.setattr(svd, "choose_method", lambda *_, **__: "krylov")
    monkeypatch.setattr(svd, "CHEAP_GRAM", 0)
    spectrum = torch.full((400,), below, dtype=torch.float64)
    spectrum[:150] = torch.linspace(1 + spread, 1, 150)
    W = with_spectrum(500, 400, spectrum, seed=1).float()
    check_triplets(W, rank, pk.truncated_svd(W, rank))


def test_a_failed_eigensolver_falls_back_to_a_dense_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    W = realistic(600, 600).float()
    monkeypatch.setattr(svd, "block_krylov", fail)
    result = pk.truncated_svd(W, 16)
    assert result.certificate.method == "gram"
    check_triplets(W, 16, result)


@pytest.mark.parametrize(
    ("m", "n", "rank", "niter", "method"),
    [
        (4096, 4096, 16, None, "krylov"),
        (4096, 4096, 3000, None, "svd"),
        (4096, 4096, 1500, None, "gram"),
        (64, 64, 8, None, "gram"),
        (64, 64, 64, None, "svd"),
        (1, 1, 1, None, "svd"),
        (128256, 4096, 16, 4, "krylov"),
    ],
)
def test_cost_model(m: int, n: int, rank: int, niter: int | None, method: str) -> None:
    assert svd.choose_method(m, n, rank, niter) == method


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
def test_ends_of_the_range(shape: tuple[int, int], rank: int, dtype: torch.dtype, scale: float) -> None:
    W = realistic(*shape)
    W = (W / W.abs().max() * scale).to(dtype)
    result = pk.truncated_svd(W, rank)
    check_triplets(W, rank, result)
    assert result.certificate.converged
    assert energy_deficit(W, result.Vh) <= 1e-6


def test_singular_values_beyond_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="exceed float32's range"):
        pk.truncated_svd(torch.full((8, 8), 3e38), 1)


def test_layouts_and_flags_do_not_change_the_answer() -> None:
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


def test_ambient_modes_do_not_change_the_answer() -> None:
    W = realistic(500, 600).bfloat16()
    expected = pk.truncated_svd(W, 8)

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


def test_seeds_are_its_own() -> None:
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
def test_refusals(arguments: dict, error: type[Exception], words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=words):
        pk.truncated_svd(**arguments)


def test_a_basis_stays_orthonormal_when_nothing_is_left_to_add() -> None:
    """Steep spectra leave only rounding noise after a few blocks; the error must not grow from panel to panel."""
    W = with_spectrum(600, 420, 0.5 ** torch.arange(420, dtype=torch.float64), seed=7).float()
    panel, _ = orthonormalize(W.mT @ torch.randn(600, 12, generator=torch.Generator().manual_seed(0)))
    basis = panel.mT.contiguous()
    while len(basis) < 200:
        panel, _ = orthonormalize(W.mT @ (W @ panel), basis)
        assert (basis.double() @ panel.double()).abs().max() <= 20 * EPS
        basis = torch.cat([basis, panel.mT])


@pytest.mark.parametrize("kind", ["generic", "dependent", "zero", "inside the basis", "tiny", "ill-conditioned"])
@pytest.mark.parametrize("size", [0, 40])
def test_orthonormalize_any_panel(kind: str, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    n, b = 120, 12
    # unit vectors first: the very ones that Householder returns for a zero panel
    basis = torch.eye(n)[:size]
    Z = torch.randn(n, b, generator=generator)
    if kind == "dependent":
        Z[:, 3] = Z[:, 1]
        Z[:, 7] = 0
    elif kind == "zero":
        Z.zero_()
    elif kind == "inside the basis":
        Z[size:] = 0
    elif kind == "tiny":
        Z *= 1e-18
    elif kind == "ill-conditioned":
        Z = Z @ torch.linalg.qr(torch.randn(b, b, generator=generator))[0] * torch.logspace(0, -6, b)
        Z = Z @ torch.linalg.qr(torch.randn(b, b, generator=generator))[0]
    panel, deficient = orthonormalize(Z, basis)
    assert (panel.double().mT @ panel.double() - torch.eye(b)).abs().max() <= 10 * EPS
    assert size == 0 or (basis.double() @ panel.double()).abs().max() <= 10 * EPS
    assert deficient == (kind in ("dependent", "zero", "ill-conditioned", "inside the basis"))
    if kind in ("generic", "tiny"):
        rest = Z.double() - basis.double().mT @ (basis.double() @ Z.double())
        assert (rest - panel.double() @ (panel.double().mT @ rest)).norm() <= 1e-5 * rest.norm(), "spans what Z adds"
