"""The fixed schedule: accuracy in a GPU's arithmetic, certificates, independence of the batch, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pissa_kernels as pk
from bench.initializers.spectra import leading_values, synthetic_weight
from pissa_kernels.factors import tolerance
from pissa_kernels.ops import dispatch
from pissa_kernels.svd import driver, fixed
from pissa_kernels.svd.sketches import random_signs

from ..support import tensor_cores
from ..support.reference import KINDS, check_triplets, energy_deficit, matrix, real_weights, realistic, with_spectrum

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOL = tolerance(torch.bfloat16)
SOURCES = {
    "query": "encoder.layer.0.attention.self.query.weight",
    "value": "encoder.layer.2.attention.self.value.weight",
    "intermediate": "encoder.layer.3.intermediate.dense.weight",
    "output": "encoder.layer.5.output.dense.weight",
}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go through the schedule."""
    monkeypatch.setattr(fixed, "DEVICES", ("cpu",))


@pytest.fixture
def tensor_core_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "bodies", lambda weights: tensor_cores.body())


def check_certificate(W: Tensor, rank: int, tol: float = TOL) -> str:
    """The deficit is small, or the certificate denies it; the word says which of the two."""
    tall = W if W.shape[0] >= W.shape[1] else W.mT
    solution = fixed.solve([tall], rank, tol=tol, seed=0)
    figures = solution.figures[0]
    if not figures.certificate(tol).converged:
        return "denied"
    true = energy_deficit(tall, solution.V[0].mT)
    assert true <= tol
    assert true <= figures.deficit + 1e-9, "the estimate is an upper one"
    assert figures.deficit <= 3 * true + 1e-9, "by no more than it says"
    return "converged"


@pytest.mark.parametrize("rank", [16, 128])
@pytest.mark.parametrize("name", [*SOURCES, "mix", "power", "flat"])
def test_every_spectrum(name: str, rank: int, on_cpu: None) -> None:
    kind = name if name not in SOURCES else "real-like"
    W = synthetic_weight((500, 400), kind, source=SOURCES.get(name, "")).bfloat16()
    assert check_certificate(W, rank) == "converged"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", [*SOURCES, "mix", "power", "flat"])
def test_every_spectrum_in_the_arithmetic_of_tensor_cores(
    name: str, rank: int, on_cpu: None, tensor_core_arithmetic: None
) -> None:
    kind = name if name not in SOURCES else "real-like"
    W = synthetic_weight((1024, 1024), kind, source=SOURCES.get(name, "")).bfloat16()
    assert check_certificate(W, rank) == "converged"


@pytest.mark.parametrize("name", ["query", pytest.param("output", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [16, pytest.param(128, marks=pytest.mark.slow)])
def test_real_weights_in_the_arithmetic_of_tensor_cores(
    name: str, rank: int, on_cpu: None, tensor_core_arithmetic: None
) -> None:
    assert check_certificate(real_weights()[SOURCES[name]].bfloat16(), rank) == "converged"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128, 256])
def test_every_real_weight(rank: int, on_cpu: None) -> None:
    words = {name: check_certificate(W.bfloat16(), rank) for name, W in real_weights().items()}
    assert set(words.values()) == {"converged"}


@pytest.mark.parametrize("factor", [3.0, 10.0, 50.0])
@pytest.mark.parametrize("rank", [16, 128])
def test_outliers_among_the_singular_values(rank: int, factor: float, on_cpu: None) -> None:
    """Far above the others, they drown a panel's columns in the rounding of its pieces."""
    values, edge = leading_values(512, "real-like", source=SOURCES["value"])
    spectrum = torch.cat([values, torch.linspace(edge, edge / 4, 512 - len(values), dtype=torch.float64)])
    spectrum[:2] *= factor
    W = with_spectrum(600, 512, spectrum, seed=2).bfloat16()
    word = check_certificate(W, rank)
    assert word == "converged" or factor == 50.0
    [svd] = driver.solve_batch([W], rank, tol=TOL, niter=None, seed=0)
    assert energy_deficit(W, svd.Vh) <= TOL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "rank"), [(250, 200, 8), (150, 200, 40), (96, 70, 70)])
def test_any_matrix(m: int, n: int, rank: int, kind: str, dtype: torch.dtype, on_cpu: None) -> None:
    W = matrix(kind, m, n, seed=3).to(dtype)
    result = pk.truncated_svd(W, rank, tol=TOL)
    check_triplets(W, rank, result)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("below", [0.9, 0.05])
@pytest.mark.parametrize("rank", [1, 16])
def test_a_cluster_is_not_mistaken_for_convergence(spread: float, below: float, rank: int, on_cpu: None) -> None:
    spectrum = torch.full((400,), below, dtype=torch.float64)
    spectrum[:150] = torch.linspace(1 + spread, 1, 150)
    W = with_spectrum(500, 400, spectrum, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        assert check_certificate(W.to(dtype), rank) in ("converged", "denied")


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scales(scale: float, on_cpu: None) -> None:
    W = (realistic(300, 260) * scale).bfloat16()
    [svd] = driver.solve_batch([W], 8, tol=TOL, niter=None, seed=0)
    assert energy_deficit(W.double() / scale, svd.Vh) <= TOL


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float, on_cpu: None) -> None:
    weights = [realistic(200, 160, seed=seed).bfloat16() for seed in range(3)]
    weights[1][5, 7] = bad
    with pytest.raises(ValueError, match=r"the weight holds (NaN|Inf)"):
        driver.solve_batch(weights, 4, tol=TOL, niter=None, seed=0)
    # the others have what they have alone
    both = fixed.solve(weights, 4, tol=TOL, seed=0)
    alone = fixed.solve(weights[2:], 4, tol=TOL, seed=0)
    assert torch.equal(both.V[2], alone.V[0])


@pytest.mark.parametrize("rank", [4, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_has_the_bits_of_its_members(dtype: torch.dtype, rank: int, on_cpu: None) -> None:
    spectra = [torch.arange(1, 261, dtype=torch.float64) ** -power for power in (0.02, 0.3, 1.0)]
    weights = [with_spectrum(300, 260, spectrum, seed=seed).to(dtype) for seed, spectrum in enumerate(spectra)]
    weights += [torch.zeros(300, 260, dtype=dtype), realistic(300, 260).to(dtype)]
    for order in (range(5), reversed(range(5))):
        chosen = list(order)
        together = driver.solve_batch([weights[index] for index in chosen], rank, tol=TOL, niter=None, seed=0)
        for index, svd in zip(chosen, together, strict=True):
            [alone] = driver.solve_batch([weights[index]], rank, tol=TOL, niter=None, seed=0)
            assert all(map(torch.equal, svd[:3], alone[:3]))
            assert svd.certificate == alone.certificate


def test_a_weight_that_falls_short_goes_through_further_filters(on_cpu: None) -> None:
    slow = synthetic_weight((900, 800), "flat").bfloat16()
    fast = synthetic_weight((900, 800), "power").bfloat16()
    tight = 1e-10
    solution = fixed.solve([fast, slow, fast], 16, tol=tight, seed=0)
    passes = [figures.passes for figures in solution.figures]
    assert passes[1] > passes[0] == passes[2]
    for W, V, figures in zip((fast, slow, fast), solution.V, solution.figures, strict=True):
        assert energy_deficit(W, V.mT) <= figures.deficit <= tight


def test_without_further_filters_the_iteration_takes_over(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed, "FURTHER_ROUNDS", 0)
    monkeypatch.setattr(fixed, "SCHEDULES", {16: fixed.Schedule(32, (2,))})
    W = synthetic_weight((900, 800), "flat").bfloat16()
    [svd] = driver.solve_batch([W], 16, tol=TOL, niter=None, seed=0)
    assert svd.certificate.method in (*driver.ITERATIONS, "gram")
    assert energy_deficit(W, svd.Vh) <= TOL


@pytest.mark.parametrize("niter", [0, 4, 16])
def test_rounds_of_subspace_iteration_are_surpassed(niter: int, on_cpu: None) -> None:
    W = realistic(400, 300).bfloat16()
    result = pk.truncated_svd(W, 16, niter=niter)
    torch.manual_seed(0)
    _, _, V = torch.svd_lowrank(W.float(), 16, niter=niter)
    assert energy_deficit(W, result.Vh) <= energy_deficit(W, V.mT)


class Transfers(TorchDispatchMode):
    """Counts the operations that return numbers to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if re.match(r"aten\.(_local_scalar_dense|is_nonzero|nonzero|equal|item)", str(func)):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_every_round_has_one_transfer_to_the_host(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = 0
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        nonlocal lists
        lists += 1
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    weights = [realistic(300, 280, seed=seed).bfloat16() for seed in range(3)]
    with Transfers() as transfers:
        solution = fixed.solve(weights, 8, tol=TOL, seed=0)
    assert all(figures.deficit <= TOL for figures in solution.figures)
    assert (lists, transfers.count) == (1, 0)


def test_the_schedule_in_triton_kernels(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its steps on the interpreter; tests/ops compares each kernel with float64."""
    weights = [realistic(80, 72, seed=seed).bfloat16() for seed in range(2)]
    reasons = pk.ops.unsupported_reasons("matmul", weights[0])["triton"]
    if reasons:
        pytest.skip(f"triton: {'; '.join(reasons)}")
    monkeypatch.setattr(fixed, "SCHEDULES", {4: fixed.Schedule(16, (3,))})
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    ours = fixed.solve(weights, 4, tol=1.0, seed=0)
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    theirs = fixed.solve(weights, 4, tol=1.0, seed=0)
    for W, mine, other, V in zip(weights, ours.figures, theirs.figures, ours.V, strict=True):
        assert mine.deficit == pytest.approx(other.deficit, rel=0.1)
        assert mine.largest == pytest.approx(other.largest, rel=1e-5)
        assert energy_deficit(W, V.mT) <= mine.deficit


def test_random_signs() -> None:
    signs = random_signs(33, 70, 5, torch.device("cpu"))
    assert signs.shape == (33, 70)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 0.1
    assert (signs.mT @ signs / 33 - torch.eye(70)).abs().max() < 0.8
    assert torch.equal(signs, random_signs(33, 70, 5, torch.device("cpu")))
    assert not torch.equal(signs, random_signs(33, 70, 6, torch.device("cpu")))


def test_the_global_random_state_is_left_alone(on_cpu: None) -> None:
    before = torch.get_rng_state()
    fixed.solve([realistic(150, 140).bfloat16()], 4, tol=TOL, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_without_a_schedule_go_to_the_iterations(on_cpu: None) -> None:
    W = torch.empty(2000, 1000)
    assert not fixed.runs_on(W.device, W.shape, 257)
    assert fixed.runs_on(W.device, W.shape, 256)
    assert fixed.schedule(100, 64) == fixed.Schedule(100, ())
    assert fixed.schedule(5000, 17) == fixed.SCHEDULES[32]
