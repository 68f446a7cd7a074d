"""Products of the faster backends against float64, with the reference's own error for comparison."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pissa_kernels as pk
from pissa_kernels.ops import dispatch, isa, reference

from ..support.backends import DTYPES, LAYOUTS, randn, shapes
from .test_verbs import layouts

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [1, 16, 40])
def test_products_are_as_exact_as_the_reference(dtype: torch.dtype, layout: str, columns: int, backend: str) -> None:
    for shape in shapes(backend, layout if columns == 16 else ""):
        dense = randn(*shape).to(dtype)
        W = layouts(dense)[layout]
        X, Y = randn(shape[1], columns, seed=2), randn(shape[0], columns, seed=3)
        for verb, P, A in (("matmul", X, dense.double()), ("rmatmul", Y, dense.double().mT)):
            exact = A @ P.double()
            got = getattr(pk.ops, verb)(W, P)
            assert got.is_contiguous()
            torchs = (getattr(reference, verb)(W, P) - exact).norm() + exact.norm() * 2.0**-24
            assert (got - exact).norm() <= 1.1 * torchs, (verb, shape)
        first, second = pk.ops.normal(W, X)
        assert first.is_contiguous()
        assert second.is_contiguous()
        assert torch.equal(first, pk.ops.matmul(W, X))
        if backend == "triton":  # csrc adds the sums over each thread's rows
            assert torch.equal(second, pk.ops.rmatmul(W, first))
        exact = dense.double().mT @ first.double()
        torchs = (reference.rmatmul(W, first) - exact).norm() + exact.norm() * 2.0**-24
        # sums over thousands of rows: torch's own error differs by an eighth between CPUs
        assert (second - exact).norm() <= 1.25 * torchs, shape


@settings(max_examples=60, deadline=None)
@given(
    batch=st.sampled_from([0, 0, 1, 3]),
    m=st.integers(0, 150),
    n=st.integers(0, 300),
    columns=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    threads=st.integers(1, 3),
    name=st.sampled_from(isa.NAMES),
)
def test_products_of_any_shape_are_within_their_roundoff(
    batch: int, m: int, n: int, columns: int, dtype: torch.dtype, layout: str, threads: int, name: str
) -> None:
    weights = [layouts(randn(m, n, seed=seed).cpu().to(dtype))[layout] for seed in range(max(batch, 1))]
    W = torch.stack([weight.mT for weight in weights]).mT if layout == "column" else torch.stack(weights)
    W = W if batch else weights[0]
    X = randn(*W.shape[:-2], columns, n, seed=8).cpu().mT  # a panel that is not contiguous
    Y = randn(*W.shape[:-1], columns, seed=9).cpu()
    if dispatch.unsupported_reasons("matmul", W)["csrc"] or isa.unsupported_reasons()[name]:
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        csrc = dispatch.load("csrc")
        with isa.using(name):
            got = [csrc.matmul(W, X), csrc.rmatmul(W, Y), *csrc.normal(W, X)]
            again = [csrc.matmul(W, X), csrc.rmatmul(W, Y), *csrc.normal(W, X)]
    finally:
        torch.set_num_threads(before)
    A = W.double()
    pairs = [(A, X), (A.mT, Y), (A, X), (A.mT, got[2])]
    for product, same, (left, right) in zip(got, again, pairs, strict=True):
        exact, magnitude = left @ right.double(), left.abs() @ right.double().abs()
        assert product.shape == exact.shape
        assert product.is_contiguous()
        assert torch.equal(product, same)
        assert ((product - exact).abs() <= (left.shape[-1] + 2) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n"), [(70, 50), (400, 301), (0, 300), (3, 0)])
def test_gram_matrices_of_the_reference(dtype: torch.dtype, layout: str, m: int, n: int) -> None:
    dense = randn(m, n).to(dtype)
    W, exact = layouts(dense)[layout], dense.double().mT @ dense.double()
    magnitude = dense.double().abs().mT @ dense.double().abs()
    for wide, roundoff in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        got = reference.gram(W, wide, scale=0.5)
        assert got.dtype == wide
        assert ((got - exact / 4).abs() <= (m + 2) * roundoff * magnitude).all()
        assert ((got - got.mT).abs() <= (m + 2) * roundoff * magnitude).all()


@pytest.mark.slow
@pytest.mark.usefixtures("csrc_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1500, 2900), (11000, 200), (200, 11000), (40000, 96)])
@pytest.mark.parametrize("columns", [8, 24, 200])
def test_long_sums_in_csrc_are_as_exact_as_the_reference(
    dtype: torch.dtype, transposed: bool, shape: tuple[int, int], columns: int
) -> None:
    W = randn(*shape).to(dtype)
    W = W.mT if transposed else W
    X = randn(W.shape[1], columns, seed=2)
    Y, Z = pk.ops.normal(W, X)
    for verb, A, P, got in (("matmul", W.double(), X, Y), ("rmatmul", W.double().mT, Y, Z)):
        exact = A @ P.double()
        torchs = (getattr(reference, verb)(W, P) - exact).norm()
        assert (got - exact).norm() <= 1.1 * torchs, verb
        assert (getattr(pk.ops, verb)(W, P) - exact).norm() <= 1.1 * torchs, verb


@pytest.mark.usefixtures("csrc_backend")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["weight", "panel"])
def test_inf_and_nan_propagate_as_in_the_reference(transposed: bool, value: float, where: str) -> None:
    W, X = randn(70, 150).bfloat16(), randn(150, 5, seed=2)
    if where == "weight":
        W[65, 149] = value
    else:
        X[149, 4] = value
    W = W.mT.contiguous().mT if transposed else W
    for got, expected in zip(pk.ops.normal(W, X), reference.normal(W, X), strict=True):
        assert not expected.isfinite().all()
        assert torch.equal(got.isfinite(), expected.isfinite())
        assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.usefixtures("csrc_backend")
def test_every_16_bit_pattern_is_widened_as_torch_widens_it() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        W = bits.view(dtype).view(-1, 1)
        got, expected = pk.ops.matmul(W, torch.ones(1, 1)), W.float()
        assert ((got == expected) | (got.isnan() & expected.isnan())).all()


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("pieces", "roundoff"), [(1, 2.0**-9), (2, 2.0**-17)])
def test_fewer_pieces_stay_within_their_bound(dtype: torch.dtype, pieces: int, roundoff: float) -> None:
    W, X = randn(200, 300).to(dtype), randn(300, 20, seed=2)
    exact = W.double() @ X.double()
    magnitude = W.double().abs() @ X.double().abs()
    error = (pk.ops.matmul(W, X, pieces=pieces) - exact).abs()
    assert (error <= (roundoff + 300 * 2**-24) * magnitude).all()
    if dtype == torch.bfloat16:  # and no more pieces than requested are used
        assert error.norm() > 4 * (pk.ops.matmul(W, X, pieces=pieces + 1) - exact).norm()


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weights_of_a_stack_do_not_affect_each_other(dtype: torch.dtype, transposed: bool) -> None:
    W = randn(3, 40, 150).to(dtype)
    W, X = (W.mT, randn(3, 40, 7)) if transposed else (W, randn(3, 150, 7))
    exact = W.double() @ X.double()
    got = pk.ops.matmul(W, X)
    assert (got - exact).norm() <= 1.1 * (reference.matmul(W, X) - exact).norm() + exact.norm() * 2.0**-24
    for index in range(3):
        assert torch.equal(pk.ops.matmul(W[index], X[index]), got[index])
    shared = pk.ops.matmul(W[:1].expand(3, -1, -1), X[:1].expand(3, -1, -1))
    assert torch.equal(shared, got[:1].expand(3, -1, -1))
