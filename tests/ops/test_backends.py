"""Transposes, casts, subtractions and sums of squares of the faster backends against float64.

Their errors are compared with those of the reference on the same input. On a machine without a GPU Triton's kernels run
under its interpreter, and csrc's on the CPU where csrc was built.
"""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pissa_kernels as pk
from pissa_kernels.ops import dispatch, reference

from ..support.backends import (
    DEVICE,
    DTYPES,
    FASTER,
    LARGE,
    LAYOUTS,
    MANY,
    SMALL,
    randn,
    shapes,
    subtraction_error,
)
from ..support.reference import ROUNDOFF
from .test_verbs import layouts

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.slow
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transpose_cast_equals_torch(source: torch.dtype, target: torch.dtype, layout: str, backend: str) -> None:
    for shape in shapes(backend, layout):
        W = layouts(randn(*shape).to(source))[layout]
        got = pk.ops.transpose_cast(W, target)
        assert got.is_contiguous()
        assert torch.equal(got, W.mT.to(target)), shape


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [1, 3, 16, 33])
def test_subtraction_is_as_exact_as_the_reference(
    dtype: torch.dtype, fan_in_fan_out: bool, layout: str, rank: int, backend: str
) -> None:
    for shape in shapes(backend, layout if rank == 16 else ""):
        dense = randn(*shape).to(dtype)
        out_features, in_features = shape[::-1] if fan_in_fan_out else shape
        B, A = randn(out_features, rank, seed=2), randn(rank, in_features, seed=3)
        product = B.double() @ A.double()
        exact = dense.double() - 0.7 * (product.mT if fan_in_fan_out else product)
        W = layouts(dense.clone())[layout]
        whole = W if W._base is None else W._base
        outside = whole.clone()
        assert pk.ops.subtract_lowrank_(W, B, A, 0.7, fan_in_fan_out) is W
        magnitude = B.double().abs() @ A.double().abs()
        magnitude = dense.double().abs() + 0.7 * (magnitude.mT if fan_in_fan_out else magnitude)
        bound = ROUNDOFF[dtype] * exact.abs() * (1 + ROUNDOFF[dtype]) + (rank + 3) * 2**-24 * magnitude
        assert ((W.double() - exact).abs() <= bound).all(), shape
        if W.numel() >= MANY:
            torchs = subtraction_error(dense, B, A, 0.7, fan_in_fan_out, backend, exact)
            assert (W - exact).norm() <= 1.1 * torchs, shape
        if layout == "strided":  # elements between those of the slice are unchanged
            outside[::2, 2 : shape[1] + 2] = W
            assert torch.equal(whole, outside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [128, 512])
def test_subtraction_at_high_ranks(dtype: torch.dtype, rank: int, backend: str) -> None:
    dense, B, A = randn(200, 150).to(dtype), randn(200, rank, seed=2), randn(rank, 150, seed=3)
    exact = dense.double() - 1.5 * (B.double() @ A.double())
    got = pk.ops.subtract_lowrank_(dense.clone(), B, A, 1.5)
    torchs = reference.subtract_lowrank_(dense.clone(), B, A, 1.5)
    assert (got - exact).norm() <= 1.1 * (torchs - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["torch", "csrc", "triton"])
def test_sums_of_squares_have_float32_accuracy(
    dtype: torch.dtype, layout: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in SMALL if name == "triton" and DEVICE == "cpu" else SMALL + LARGE:
        W = layouts(randn(*shape).to(dtype))[layout][None].expand(2, -1, -1)
        reasons = pk.ops.unsupported_reasons("sum_of_squares", W)[name]
        if reasons:
            pytest.skip(f"{name}: {'; '.join(reasons)}")
        monkeypatch.setenv(dispatch.VARIABLE, name)
        got = pk.ops.sum_of_squares(W)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, W.double().square().sum((1, 2)), rtol=1e-6, atol=0)
    shared = randn(130).to(dtype).expand(1, 63, 130)
    for W in (shared, shared.mT):
        torch.testing.assert_close(
            pk.ops.sum_of_squares(W), W.double().square().sum((1, 2)), rtol=1e-6, atol=0, msg="rows share memory"
        )
    for bad in (math.nan, math.inf):
        W = layouts(
            randn(63, 130).to(dtype).index_put_((torch.tensor(62), torch.tensor(129)), torch.tensor(bad).to(dtype))
        )
        assert not pk.ops.sum_of_squares(W[layout][None]).isfinite().any()
    with pytest.raises(ValueError, match=r"must be a \w+ \(batch, m, n\), got shape \(3, 4\)"):
        pk.ops.sum_of_squares(randn(3, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_of_any_layout(transposed: bool, backend: str) -> None:
    W, B, A = randn(40, 30).bfloat16(), randn(5, 40).mT, randn(60, 10)[::2, :5].mT
    got = pk.ops.subtract_lowrank_(W.clone(), B, A, 1.0)
    contiguous = pk.ops.subtract_lowrank_(W.clone(), B.contiguous(), A.contiguous(), 1.0)
    assert torch.equal(got, contiguous)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_pattern_is_cast_as_torch_casts_it(dtype: torch.dtype, backend: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    W = bits.view(dtype).to(DEVICE)
    for target in DTYPES:
        got, expected = pk.ops.transpose_cast(W, target), W.mT.to(target)
        assert ((got == expected) | (got.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("target", DTYPES)
def test_floats_are_cast_as_torch_casts_them(target: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(8)
    bits = torch.randint(-(2**31), 2**31 - 1, (256, 250), generator=generator).to(torch.int32)
    usual = torch.randn(256, 250, generator=generator) * torch.logspace(-9, 6, 250)
    W = torch.cat([bits.view(torch.float32), usual]).to(DEVICE)
    got, expected = pk.ops.transpose_cast(W, target), W.mT.to(target)
    assert ((got == expected) | (got.isnan() & expected.isnan())).all()


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(0, 90),
    n=st.integers(0, 90),
    rank=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    name=st.sampled_from(FASTER),
)
def test_any_shape_is_within_one_rounding(
    m: int, n: int, rank: int, dtype: torch.dtype, layout: str, name: str
) -> None:
    W = layouts(randn(m, n).to(dtype))[layout]
    if dispatch.unsupported_reasons("subtract_lowrank_", W)[name]:
        return
    B, A = randn(m, rank, seed=2), randn(rank, n, seed=3)
    exact = W.double() - 2 * (B.double() @ A.double())
    magnitude = W.double().abs() + 2 * (B.double().abs() @ A.double().abs())
    bound = ROUNDOFF[dtype] * exact.abs() * (1 + ROUNDOFF[dtype]) + (rank + 3) * 2**-24 * magnitude
    transposed = dispatch.load(name).transpose_cast(W, torch.float32)
    assert torch.equal(transposed, W.mT.float())
    dispatch.load(name).subtract_lowrank_(W, B, A, 2.0)
    assert ((W.double() - exact).abs() <= bound).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="reserves address space without memory, as only a CPU can")
def test_offsets_beyond_32_bits(backend: str) -> None:
    rows, stride = 3, 3 * 2**29  # the last row begins at element 3·2³⁰
    noreserve = 0x4000  # MAP_NORESERVE on Linux: only pages that are written use memory
    size = ((rows - 1) * stride + 64) * 2
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve)
    W = torch.frombuffer(space, dtype=torch.bfloat16).as_strided((rows, 40), (stride, 1))
    dense = randn(rows, 40).bfloat16()
    W.copy_(dense)
    B, A = randn(rows, 4, seed=2), randn(4, 40, seed=3)
    assert torch.equal(pk.ops.transpose_cast(W, torch.float32), dense.mT.float())
    for view, fan_in_fan_out in ((W, False), (W.mT, True)):
        W.copy_(dense)
        pk.ops.subtract_lowrank_(view, B, A, 1.0, fan_in_fan_out)
        assert torch.equal(W, pk.ops.subtract_lowrank_(dense.clone(), B, A, 1.0))
    W.copy_(dense)
    X, Y = randn(40, 5), randn(rows, 5)
    assert torch.equal(pk.ops.matmul(W, X), pk.ops.matmul(dense, X))
    assert torch.equal(pk.ops.rmatmul(W, Y), pk.ops.rmatmul(dense, Y))
    assert torch.equal(pk.ops.normal(W, X)[1], pk.ops.normal(dense, X)[1])
    if backend == "triton":
        from pissa_kernels.ops.batched import Weights
        from pissa_kernels.ops.triton.batched import product

        for view, P in ((W, X), (W.mT, Y)):
            got = product(Weights.of([view]), P[None], precision=3).values
            assert got is not None
            assert torch.equal(got[0], pk.ops.matmul(view, P))
