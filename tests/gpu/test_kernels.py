"""Both GPU backends on real sizes: accuracy, streams, and weights of more than 2³¹ elements.

Where there is a CUDA device, tests/ops/ runs on its tensors, with all shapes, layouts and ranks.
"""

from __future__ import annotations

import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.ops import dispatch, reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["csrc", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    reasons = pk.ops.unsupported_reasons("transpose_cast", torch.ones(2, 2, device="cuda"))[name]
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    monkeypatch.setenv(dispatch.VARIABLE, name)
    return name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (4099, 4097)])
@pytest.mark.parametrize("rank", [16, 128])
def test_memory_bound_verbs(dtype: torch.dtype, shape: tuple[int, int], rank: int, backend: str) -> None:
    W = torch.randn(shape, device="cuda").to(dtype)
    for target in DTYPES:
        assert torch.equal(pk.ops.transpose_cast(W, target), W.mT.to(target).contiguous())
    B, A = torch.randn(shape[0], rank, device="cuda"), torch.randn(rank, shape[1], device="cuda")
    exact = W.double() - 0.7 * (B.double() @ A.double())
    theirs = (reference.subtract_lowrank_(W.clone(), B, A, 0.7).double() - exact).norm()
    for view, fan_in_fan_out in ((W.clone(), False), (W.mT.contiguous(), True)):
        got = pk.ops.subtract_lowrank_(view, B, A, 0.7, fan_in_fan_out)
        error = ((got.mT if fan_in_fan_out else got).double() - exact).norm()
        assert error <= 1.1 * theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (1000, 3000)])
@pytest.mark.parametrize("columns", [16, 24, 96, 200])
def test_products(dtype: torch.dtype, shape: tuple[int, int], columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    W = torch.randn(shape, device="cuda").to(dtype)
    for A, verb in ((W, "matmul"), (W.mT, "rmatmul")):
        P = torch.randn(A.shape[1], columns, device="cuda")
        exact = A.double() @ P.double()
        theirs = (getattr(reference, verb)(W, P).double() - exact).norm()
        # tensor cores accumulate less accurately than float32 units: twice the reference's error, not 1.1 times
        assert (getattr(pk.ops, verb)(W, P).double() - exact).norm() <= 2 * theirs
        one = getattr(pk.ops, verb)(W, P, pieces=1).double()
        assert ((one - exact).abs() <= 2 * 2.0**-9 * (A.double().abs() @ P.double().abs())).all()
        assert torch.equal(getattr(pk.ops, verb)(W, P), getattr(pk.ops, verb)(W, P)), "two runs agree"


def test_the_current_stream_is_used(backend: str) -> None:
    W = torch.zeros(4096, 4096, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # delays the write below by some 25 ms
        W.fill_(1)
        transposed = pk.ops.transpose_cast(W, torch.float32)
    stream.synchronize()
    assert (transposed == 1).all()


def test_more_than_2_31_elements(backend: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    W = torch.ones(70_000, 33_000, dtype=torch.bfloat16, device="cuda")
    B, A = torch.ones(70_000, 1, device="cuda"), torch.full((1, 33_000), 0.5, device="cuda")
    pk.ops.subtract_lowrank_(W, B, A, 1.0)
    assert bool((W[-1] == 0.5).all())
    assert bool((W[40_000] == 0.5).all())
    assert float(W.sum(dtype=torch.float64)) == 0.5 * W.numel()
    W[-1, -1] = 3
    transposed = pk.ops.transpose_cast(W, torch.bfloat16)
    assert transposed[-1, -1] == 3
    assert float(transposed.sum(dtype=torch.float64)) == 0.5 * W.numel() + 2.5
