"""Every instruction set of csrc's kernels against float64, and how one is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pissa_kernels as pk
from pissa_kernels.ops import csrc, dispatch, isa, reference

from ..support.backends import DTYPES, randn

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("csrc_backend")


@pytest.fixture(params=isa.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each instruction set, or the reason why it is skipped."""
    found: str = request.param
    if reason := isa.unsupported_reasons()[found]:
        pytest.skip(f"{found}: {reason}")
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n", "columns"), [(300, 500, 5), (129, 67, 40), (70, 1100, 16)])
def test_products_are_as_exact_as_torch(
    name: str, dtype: torch.dtype, transposed: bool, m: int, n: int, columns: int
) -> None:
    W, X = randn(m, n).to(dtype), randn(n, columns, seed=2)
    W = W.mT.contiguous().mT if transposed else W
    with isa.using(name):
        Y, Z = pk.ops.normal(W, X)
        alone = pk.ops.matmul(W, X), pk.ops.rmatmul(W, Y)
    for got, A, P, verb in (
        (Y, W.double(), X, "matmul"),
        (Z, W.double().mT, Y, "rmatmul"),
        (alone[0], W.double(), X, "matmul"),
        (alone[1], W.double().mT, Y, "rmatmul"),
    ):
        exact = A @ P.double()
        error = (getattr(reference, verb)(W, P) - exact).norm() + 2.0**-24 * exact.norm()
        assert (got - exact).norm() <= 1.1 * error


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_verbs_agree_with_the_reference(name: str, dtype: torch.dtype) -> None:
    W, B, A = randn(77, 205).to(dtype), randn(77, 9, seed=2), randn(9, 205, seed=3)
    with isa.using(name):
        transposed = pk.ops.transpose_cast(W, torch.float32)
        energy = pk.ops.sum_of_squares(W[None])
        residual = pk.ops.subtract_lowrank_(W.clone(), B, A, 0.5)
    assert torch.equal(transposed, W.mT.float())
    assert energy.item() == pytest.approx(W.double().square().sum().item(), rel=1e-6)
    exact = W.double() - 0.5 * B.double() @ A.double()
    roundoff = torch.finfo(dtype).eps / 2
    assert ((residual.double() - exact).abs() <= roundoff * exact.abs() + 2.0**-20 * (B.abs() @ A.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "wide rows"])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(("m", "n", "rank"), [(1, 1, 1), (77, 205, 9), (160, 96, 33), (700, 31, 130)])
def test_stored_factors_are_subtracted_with_one_rounding(
    name: str, dtype: torch.dtype, layout: str, fan_in_fan_out: bool, m: int, n: int, rank: int
) -> None:
    """Factors that bfloat16 holds, which tiles multiply in one piece."""
    W = randn(m, n).to(dtype)
    if layout == "columns":
        W = W.mT.contiguous().mT
    elif layout == "wide rows":
        W = torch.cat([W, torch.full_like(W, torch.nan)], dim=1)[:, :n]
    rows, cols = (n, m) if fan_in_fan_out else (m, n)
    B, A = randn(rows, rank, seed=2).bfloat16().float(), randn(rank, cols, seed=3).bfloat16().float()
    residual = torch.empty_strided(W.shape, W.stride(), dtype=dtype).copy_(W)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with isa.using(name):
            pk.ops.subtract_lowrank_(residual, B, A, 0.3, fan_in_fan_out)
    finally:
        torch.set_num_threads(threads)
    product, sizes = B.double() @ A.double(), B.double().abs() @ A.double().abs()
    product, sizes = (product.mT, sizes.mT) if fan_in_fan_out else (product, sizes)
    exact = W.double() - 0.3 * product
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + (rank + 2) * 2.0**-24 * (W.double().abs() + 0.3 * sizes)
    assert ((residual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e17])
@pytest.mark.parametrize("weight_size", [1e-39, 1.0, 1e38])
def test_stored_factors_beyond_the_range_of_tiles(name: str, size: float, weight_size: float) -> None:
    W = (randn(40, 70) * weight_size).bfloat16()
    W[3, 5], W[4, 6] = torch.inf, torch.nan
    B, A = (randn(40, 8, seed=2) * size).bfloat16().float(), (randn(8, 70, seed=3) * size).bfloat16().float()
    A[2] = 0.0
    with isa.using(name):
        residual = pk.ops.subtract_lowrank_(W.clone(), B, A, 1.0)
    expected = reference.subtract_lowrank_(W.clone(), B, A, 1.0)
    assert torch.equal(residual.isnan(), expected.isnan())
    assert torch.equal(residual.isinf(), expected.isinf())
    held = expected.isfinite()
    smallest = torch.finfo(torch.bfloat16).smallest_normal * 2.0**-8
    torch.testing.assert_close(residual[held], expected[held], rtol=2.0**-7, atol=smallest)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (300, 70), (70, 300), (600, 257), (5000, 40)])
@pytest.mark.parametrize("threads", [1, 3])
def test_gram_matrices_on_tiles_are_as_exact_as_torch(m: int, n: int, transposed: bool, threads: int) -> None:
    if isa.unsupported_reasons()["amx"]:
        pytest.skip("this CPU has no AMX")
    W = randn(m, n).bfloat16()
    W = W.mT.contiguous().mT if transposed else W
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with isa.using("amx"):
            assert pk.ops.backend("gram", W) == "csrc"
            got = dispatch.bind("gram", W)(W)
    finally:
        torch.set_num_threads(before)
    exact = W.double().mT @ W.double()
    assert torch.equal(got, got.mT)
    assert (got - exact).norm() <= 1.1 * (reference.gram(W) - exact).norm() + 2.0**-24 * exact.norm()


@pytest.mark.parametrize("size", [1e-39, 1e-20, 1e17])
def test_gram_matrices_beyond_the_range_of_tiles(size: float) -> None:
    if isa.unsupported_reasons()["amx"]:
        pytest.skip("this CPU has no AMX")
    W = (randn(80, 40) * size).bfloat16()
    with isa.using("amx"):
        got = dispatch.bind("gram", W)(W)
    assert torch.allclose(got, W.float().mT @ W.float(), rtol=1e-5, atol=2.0**-148)


@pytest.mark.parametrize(("weight_size", "panel_size"), [(1e-39, 1.0), (1e-36, 1e-3), (1.0, 1e-32), (1e-3, 3e38)])
def test_numbers_that_tiles_flush_or_overflow_are_exact(name: str, weight_size: float, panel_size: float) -> None:
    W, X = (randn(70, 90) * weight_size).bfloat16(), randn(90, 20, seed=2).clamp(-1, 1) * panel_size
    assert W.any()
    assert X.isfinite().all()
    with isa.using(name):
        got = pk.ops.matmul(W, X), pk.ops.rmatmul(W.mT, X)
    exact = W.double() @ X.double()
    error = (reference.matmul(W, X) - exact).norm() + 2.0**-24 * exact.norm() + 2.0**-150 * exact.numel() ** 0.5
    for product in got:
        assert (product - exact).norm() <= 1.1 * error


def test_results_differ_by_rounding_only() -> None:
    W = randn(400, 300).bfloat16()
    found: list[tuple[Tensor, Tensor]] = []
    for name, reason in isa.unsupported_reasons().items():
        if reason is None:
            with isa.using(name):
                svd = pk.truncated_svd(W, 16)
            assert svd.certificate.converged
            found.append((svd.S, svd.Vh))
    for S, Vh in found[1:]:
        assert torch.allclose(S, found[0][0], rtol=1e-5)
        # one subspace: the singular values of the product of its bases are 1
        assert torch.linalg.svdvals(Vh.double() @ found[0][1].double().mT).min() > 1 - 1e-3


def test_blas_multiplies_where_only_the_generic_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE)
    W = torch.ones(4, 3)
    with isa.using("generic"):
        chosen = {verb: pk.ops.backend(verb, W) for verb in ("matmul", "normal", "ritz", "transpose_cast")}
    assert chosen == {"matmul": "torch", "normal": "torch", "ritz": "torch", "transpose_cast": "csrc"}


def test_the_current_set_is_known_under_fake_tensors() -> None:
    with FakeTensorMode():
        assert isa.current() in isa.NAMES
        assert set(isa.unsupported_reasons()) == set(isa.NAMES)


def run(name: str) -> subprocess.CompletedProcess[str]:
    """A verb in a process whose instruction set is chosen by name."""
    code = """
import torch, pissa_kernels as pk
from pissa_kernels.ops import isa
print(pk.ops.matmul(torch.ones(2, 3), torch.ones(3, 2)).sum().item(), isa.current())
"""
    environment = os.environ | {isa.VARIABLE: name, dispatch.VARIABLE: "csrc"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_environment_chooses() -> None:
    assert run("generic").stdout.split() == ["12.0", "generic"]
    wrong = run("sse9")
    assert wrong.returncode == 1
    assert "PISSA_KERNELS_ISA must be one of amx, avx512, avx2, generic, got 'sse9'" in wrong.stderr
    best = next(name for name, reason in isa.unsupported_reasons().items() if reason is None)
    assert run("").stdout.split() == ["12.0", best]


def test_a_set_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = dict.fromkeys(isa.NAMES) | {"amx": isa.REASONS[isa.MISSING]}
    monkeypatch.setattr(isa, "unsupported_reasons", lambda: reasons)
    monkeypatch.setenv(isa.VARIABLE, "amx")
    with pytest.raises(RuntimeError, match="PISSA_KERNELS_ISA=amx cannot be used: this CPU"):
        isa.choose()


def test_a_set_that_disagrees_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = dict.fromkeys(isa.NAMES) | {"avx512": isa.REASONS[isa.DIFFERS]}
    monkeypatch.setattr(isa, "unsupported_reasons", lambda: reasons)
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    with pytest.warns(UserWarning, match="avx512 is not used: its kernels disagree"):
        isa.choose()


@pytest.mark.parametrize("pieces", [0, 4])
def test_the_operator_refuses_a_number_of_pieces_that_it_has_no_room_for(pieces: int) -> None:
    assert csrc._failure("cpu") is None
    with pytest.raises(RuntimeError, match="pieces must be 1, 2 or 3"):
        torch.ops.pissa_kernels.normal(torch.ones(4, 3), torch.ones(3, 2), pieces)
