"""Each iterative method on its own, whatever the cost model would choose and without a dense fallback."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pissa_kernels as pk
from pissa_kernels.ops.panels import recurrence, ritz_pairs
from pissa_kernels.svd import chebyshev, cost, krylov
from pissa_kernels.svd import driver as svd
from pissa_kernels.svd.chebyshev import chebyshev_subspaces
from pissa_kernels.svd.operators import Projection
from pissa_kernels.svd.stopping import Subspace
from pissa_kernels.svd.weight_operator import WeightOperator

from ..support.reference import KINDS, check_triplets, energy_deficit, matrix, real_spectrum, realistic, with_spectrum

Force = Callable[..., None]


def force(patch: pytest.MonkeyPatch, method: str, **changes: Any) -> None:
    """Choose ``method`` for every weight, with some parameters of its plan changed, and Krylov after it."""

    def forced(*arguments: Any, exclude: Any, formed: bool = True, **keywords: Any) -> cost.SolverPlan:
        wanted = "krylov" if method in exclude else method
        plans = [plan for plan in cost.candidates(*arguments, **keywords) if plan.method == wanted]
        return replace(min(plans, key=lambda plan: plan.seconds), **changes)

    patch.setattr(svd, "choose_plan", forced)
    patch.setattr(svd, "DENSE_FALLBACK_WIDTH", 0)


def test_steps_for_niter_amplify_as_much_as_subspace_iteration() -> None:
    """T_K by its recurrence, on a grid of gaps, wherever more than 1e-9 of the tail is left."""
    for niter in (0, 1, 2, 3, 4, 8, 16, 40):
        steps = krylov.steps_for_niter(niter)
        for x in torch.linspace(1.001, 40, 4000, dtype=torch.float64).tolist():
            before, value = 1.0, 2 * x - 1
            for _ in range(steps - 1):
                before, value = value, 2 * (2 * x - 1) * value - before
            if x ** (-2 * (niter + 1)) > 1e-9:
                assert math.sqrt(x) * value >= x ** (niter + 1) * (1 - 1e-9), (niter, x)


@pytest.mark.parametrize(
    "method", ["krylov", "chebyshev", "chebyshev through the Gram matrix", "chebyshev step by step"]
)
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(300, 420),
    n=st.integers(300, 420),
    rank=st.sampled_from([1, 2, 7, 16, 24]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    niter=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
)
def test_any_matrix(
    method: str, m: int, n: int, rank: int, kind: str, dtype: torch.dtype, niter: int | None, seed: int
) -> None:
    W = matrix(kind, m, n, seed).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if method == "krylov":
            force(patch, "krylov")
        else:
            niter = None
            force(patch, "chebyshev", through_gram="Gram" in method)
            if "step" in method:
                patch.setattr(WeightOperator, "chebyshev", lambda *_: None)
        result = pk.truncated_svd(W, rank, niter=niter, seed=seed)
    assert result.certificate.method in (*method.split(), "krylov")
    check_triplets(W, rank, result)


@pytest.mark.parametrize(("rank", "block"), [(24, 8), (64, 8), (64, 16)])
def test_more_equal_values_than_a_block_has_columns(rank: int, block: int) -> None:
    """A Krylov space has at most b directions of one singular value; the others come from arbitrary panels."""
    W = matrix("clustered", 600, 500, 0).float()  # 251 times 2, then ones
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "krylov", block=block, limit=384, check_every=1)
        result = pk.truncated_svd(W, rank)
    check_triplets(W, rank, result)
    assert energy_deficit(W, result.Vh) <= 1e-6


class Diagonal:
    """H = diag(σ²): products cost nothing, and the exact deficit is known to float64."""

    is_float32 = True
    gives_image = False

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.float()[:, None]
        self.shape = (len(values), len(values))
        self.device = torch.device("cpu")

    def sketch(self, columns: int, seed: int) -> torch.Tensor:
        return self.values * torch.randn(self.shape[1], columns, generator=torch.Generator().manual_seed(seed))

    def filter(self, X: torch.Tensor, HX: torch.Tensor, edge: float, degree: int, pieces: int) -> torch.Tensor:
        return recurrence(lambda panel, _: self.values**2 * panel, X, HX, edge, degree, pieces)

    def ritz(self, Z: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return ritz_pairs(Z, rank, lambda Q: self.project(Q)[1::-1])

    def project(self, X: torch.Tensor) -> Projection:
        Y = self.values * X
        return Projection(Y.mT @ Y, self.values * Y, None)

    def compress(self, X: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.project(X).matrix, None

    def lanczos(self) -> None:
        return None


INDEX = torch.arange(1, 1501, dtype=torch.float64)
DECAYING = {
    "power 0.3": INDEX**-0.3,
    "power 0.5": INDEX**-0.5,
    "geometric": 0.99**INDEX,
    "spikes and a bulk": torch.cat([INDEX[:90] ** -0.3, (1 - INDEX[:1410] / 1600) * 0.3]).sort(descending=True)[0],
    "real": torch.nn.functional.interpolate(real_spectrum()[None, None], size=1500, mode="linear", align_corners=True)[
        0, 0
    ],
    "semicircle": torch.sqrt(1 - ((INDEX - 1) / 1500) ** 0.7),
}


def ritz_values(sigma: torch.Tensor, subspace: Subspace, rank: int) -> tuple[list[float], list[float]]:
    """What :attr:`Subspace.deficit` takes, in float64."""
    basis = torch.linalg.qr(subspace.V.double())[0]
    values, vectors = torch.linalg.eigh(basis.mT @ (sigma[:, None] ** 2 * basis))
    V = (basis @ vectors).flip(1)[:, :rank]
    residuals = (sigma[:, None] ** 2 * V - V * values.flip(0)[:rank]).norm(dim=0)
    return values.flip(0).tolist(), residuals.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-7])
@pytest.mark.parametrize("rank", [4, 16, 64, 128])
@pytest.mark.parametrize("method", ["krylov", "chebyshev"])
@pytest.mark.parametrize("spectrum", sorted(DECAYING))
def test_an_iteration_stops_when_the_true_deficit_is_below_the_tolerance(
    spectrum: str, method: str, rank: int, tol: float
) -> None:
    sigma = DECAYING[spectrum].float().double()
    plan = min(
        (plan for plan in cost.candidates(1500, 1500, rank, None) if plan.method == method), key=lambda p: p.seconds
    )
    operator = Diagonal(sigma)
    if method == "krylov":
        found = krylov.block_krylov(operator, rank, block=plan.block, limit=plan.limit, tol=tol, max_steps=100, seed=0)
    else:
        subspaces = chebyshev_subspaces(operator, rank, block=plan.block, tol=tol, max_products=200, seed=0)
        found = next(subspace for subspace in subspaces if subspace.deficit(*ritz_values(sigma, subspace, rank)) <= tol)
    basis = torch.linalg.qr(found.V.double())[0]
    captured = torch.linalg.svdvals(sigma[:, None] * basis)[:rank].square().sum()
    deficit = 1 - float(captured / sigma[:rank].square().sum())
    # the estimate is of second order in the residuals, so it is rough while they are large
    assert deficit <= tol * (3 if tol > 1e-4 else 1)


@pytest.mark.parametrize("last", [-1e-8, 0.0, 1e-9])
@pytest.mark.parametrize("first_round", [False, True])
def test_a_filter_for_a_wanted_value_that_is_zero_up_to_round_off(last: float, first_round: bool) -> None:
    degree, sufficient, _ = chebyshev._degree(1e-3, 1e-6, last, 1.0, 1e-6, first_round, 1e4)
    assert degree == 2, "the first direction grows far more than the last"
    assert not sufficient


def test_restarts_still_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    W = realistic(600, 600).float()
    force(monkeypatch, "krylov", block=16, limit=64)
    result = pk.truncated_svd(W, 16)
    assert result.certificate.converged
    assert result.certificate.passes > 2 * 4 + 3, "the test needs a restart"
    check_triplets(W, 16, result)


@pytest.mark.parametrize("method", ["krylov", "chebyshev"])
def test_a_flat_spectrum_is_not_called_converged(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(1200, 1200, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(svd, "MAX_STEPS", 6)
    force(monkeypatch, method)
    result = pk.truncated_svd(W, 16)
    assert result.certificate.method == "krylov", "block Krylov follows a Chebyshev filter that has not converged"
    assert not result.certificate.converged
    assert energy_deficit(W, result.Vh) > 1e-6
    check_triplets(W, 16, result)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("below", [0.9, 0.05])
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("method", ["krylov", "chebyshev"])
def test_a_cluster_is_not_mistaken_for_convergence(
    method: str, spread: float, below: float, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 nearly equal singular values: the captured energy stops growing long before the iteration has converged."""
    force(monkeypatch, method)
    spectrum = torch.full((400,), below, dtype=torch.float64)
    spectrum[:150] = torch.linspace(1 + spread, 1, 150)
    W = with_spectrum(500, 400, spectrum, seed=1).float()
    check_triplets(W, rank, pk.truncated_svd(W, rank))


@pytest.mark.parametrize("niter", [None, 4])
@pytest.mark.parametrize("method", ["krylov", "chebyshev", "gram", "svd"])
@pytest.mark.parametrize("shape", [(500, 400), (400, 500)])
def test_a_batch_gives_the_results_of_its_weights_one_by_one(
    shape: tuple[int, int], method: str, niter: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "chebyshev" and niter is not None:
        pytest.skip("Chebyshev iterates to a tolerance only")
    if method in ("krylov", "chebyshev"):
        force(monkeypatch, method)
    else:
        monkeypatch.setattr(svd, "choose_plan", lambda *_, **__: cost.SolverPlan(method, 0.0))
    weights = torch.stack([realistic(*shape, seed=seed) * scale for seed, scale in enumerate((1.0, 1e3, 1e-12))])
    weights = torch.cat([weights, torch.zeros(1, *shape), with_spectrum(*shape, torch.ones(3))[None]]).bfloat16()
    together = svd.solve_batch(weights, 8, tol=1e-6, niter=niter, seed=0)
    assert len(together) == len(weights)
    for W, result in zip(weights, together, strict=True):
        alone = pk.truncated_svd(W, 8, niter=niter)
        assert result.certificate.method == alone.certificate.method == method
        check_triplets(W, 8, result)
        for name in ("U", "S", "Vh"):
            assert torch.equal(getattr(result, name), getattr(alone, name)), name
        assert result.certificate == alone.certificate


def test_truncated_svd_takes_a_single_weight() -> None:
    with pytest.raises(ValueError, match=r"must be 2-D, got shape \(2, 4, 5\)"):
        pk.truncated_svd(torch.ones(2, 4, 5), 1)
    with pytest.raises(ValueError, match=r"\(4, 5\).*got r=9"):
        pk.truncated_svd(torch.ones(4, 5), 9)
