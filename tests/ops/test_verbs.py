"""The verbs as they run by themselves, against fp64, with torch's own error as the yardstick."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.ops import reference

from ..support.reference import ROUNDOFF

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 17), (17, 1), (63, 130), (300, 200), (4097, 33), (33, 4097)]


def layouts(W: Tensor) -> dict[str, Tensor]:
    """The same values, stored in every way that a weight is met in."""
    m, n = W.shape
    padded = W.new_zeros(2 * m, n + 5)
    padded[::2, 2 : n + 2] = W
    return {"row": W, "column": W.mT.contiguous().mT, "strided": padded[::2, 2 : n + 2]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["row", "column", "strided"])
def test_products_match_fp64_as_well_as_torch_does(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=generator).to(dtype)
    W = layouts(dense)[layout]
    X = torch.randn(shape[1], 5, generator=generator)
    Y = torch.randn(shape[0], 5, generator=generator)
    for got, A, P in ((pk.ops.matmul(W, X), dense, X), (pk.ops.rmatmul(W, Y), dense.mT, Y)):
        exact = A.double() @ P.double()
        torchs = (A.float() @ P - exact).norm()
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        # half an ulp of the result for the cases where torch happens to be exact
        assert (got - exact).norm() <= 1.1 * torchs + exact.norm() * 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (600, 514)])
@pytest.mark.parametrize("layout", ["row", "column", "strided"])
def test_normal_is_both_products(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=generator).to(dtype)
    X = torch.randn(shape[1], 5, generator=generator)
    Y, Z = pk.ops.normal(layouts(dense)[layout], X)
    assert (Y.dtype, Z.dtype, Y.is_contiguous(), Z.is_contiguous()) == (torch.float32, torch.float32, True, True)
    exact = dense.double() @ X.double()
    exact_twice = dense.double().mT @ exact
    torchs = dense.float() @ X
    torchs_twice = dense.float().mT @ torchs
    assert (Y - exact).norm() <= 1.1 * (torchs - exact).norm() + exact.norm() * 2**-24
    assert (Z - exact_twice).norm() <= 1.1 * (torchs_twice - exact_twice).norm() + exact_twice.norm() * 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("elements", [1 << 20, 700])
def test_a_stack_is_its_weights(
    dtype: torch.dtype, transposed: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reference.BLOCK_ELEMENTS, "cpu", elements)  # the second: three rows of each at a time
    generator = torch.Generator().manual_seed(6)
    W = torch.randn(5, 40, 37, generator=generator).to(dtype)
    W = W.mT if transposed else W
    X = torch.randn(5, W.shape[2], 3, generator=generator)
    Y = torch.randn(5, W.shape[1], 3, generator=generator)
    exact = {
        "matmul": W.double() @ X.double(),
        "rmatmul": W.double().mT @ Y.double(),
        "normal": W.double().mT @ (W.double() @ X.double()),
    }
    got = {"matmul": pk.ops.matmul(W, X), "rmatmul": pk.ops.rmatmul(W, Y), "normal": pk.ops.normal(W, X)[1]}
    for verb, result in got.items():
        assert result.is_contiguous()
        assert (result - exact[verb]).norm() <= 4 * 2**-24 * exact[verb].norm(), verb
    torch.testing.assert_close(pk.ops.normal(W, X)[0], got["matmul"], rtol=1e-6, atol=1e-5)
    with pytest.raises(ValueError, match=r"takes a panel \(5, \d+, k\), got \(4, "):
        pk.ops.matmul(W, X[:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("layout", ["row", "column", "strided"])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_subtraction_rounds_once(dtype: torch.dtype, fan_in_fan_out: bool, layout: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(300, 200, generator=generator).to(dtype)
    shape = dense.mT.shape if fan_in_fan_out else dense.shape
    B = torch.randn(shape[0], rank, generator=generator)
    A = torch.randn(rank, shape[1], generator=generator)
    product = B.double() @ A.double()
    exact = dense.double() - 0.7 * (product.mT if fan_in_fan_out else product)
    W = layouts(dense.clone())[layout]
    whole = W if W._base is None else W._base
    outside = whole.clone()
    returned = pk.ops.subtract_lowrank_(W, B, A, 0.7, fan_in_fan_out)
    assert returned is W
    magnitude = dense.double().abs() + 0.7 * (
        (B.abs().double() @ A.abs().double()).mT if fan_in_fan_out else B.abs().double() @ A.abs().double()
    )
    bound = ROUNDOFF[dtype] * exact.abs() * (1 + ROUNDOFF[dtype]) + (rank + 2) * 2**-24 * magnitude
    assert ((W.double() - exact).abs() <= bound).all()
    if layout == "strided":  # the neighbors of a slice belong to another tensor
        outside[::2, 2:202] = W
        assert torch.equal(whole, outside)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("layout", ["row", "column", "strided"])
def test_transpose_cast_is_torchs_cast_transposed(source: torch.dtype, target: torch.dtype, layout: str) -> None:
    dense = torch.randn(65, 130, generator=torch.Generator().manual_seed(3)).to(source)
    got = pk.ops.transpose_cast(layouts(dense)[layout], target)
    assert torch.equal(got, dense.mT.to(target))
    assert got.is_contiguous()


def test_transpose_cast_never_shares_storage() -> None:
    W = torch.ones(4, 1)
    pk.ops.transpose_cast(W, torch.float32).zero_()
    assert W.sum() == 4


def test_double_panels_give_double_products() -> None:
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(4)).bfloat16()
    X = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(pk.ops.matmul(W, X), W.double() @ X, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda W: pk.ops.matmul(W, torch.ones(5, 2)), ValueError, r"\(6, 4\) takes a panel \(4, k\), got \(5, 2\)"),
        (lambda W: pk.ops.rmatmul(W, torch.ones(4, 2)), ValueError, r"takes a panel \(6, k\)"),
        (lambda W: pk.ops.matmul(W, torch.ones(4, 2).half()), TypeError, "panel must be float32"),
        (lambda W: pk.ops.matmul(W.double(), torch.ones(4, 2)), TypeError, "got torch.float64"),
        (lambda W: pk.ops.matmul(W[0], torch.ones(4, 2)), ValueError, "must be 2-D"),
        (lambda W: pk.ops.transpose_cast(W, torch.int8), TypeError, "got torch.int8"),
        (lambda W: pk.ops.subtract_lowrank_(W, torch.ones(4, 2), torch.ones(2, 6), 1.0), ValueError, r"B \(6, r\)"),
        (lambda W: pk.ops.subtract_lowrank_(W, torch.ones(6, 2).half(), torch.ones(2, 4), 1.0), TypeError, "float32"),
        (
            lambda W: pk.ops.subtract_lowrank_(W[:1].expand(6, 4), torch.ones(6, 2), torch.ones(2, 4), 1.0),
            ValueError,
            "share memory",
        ),
        (lambda W: pk.ops.backend("matmull", W), ValueError, "verb must be one of"),
    ],
)
def test_wrong_arguments_are_named(call, error: type[Exception], words: str) -> None:  # type: ignore[no-untyped-def]
    W = torch.ones(6, 4)
    with pytest.raises(error, match=words):
        call(W)
    assert torch.equal(W, torch.ones(6, 4))


def test_overlap_is_told_from_strides() -> None:
    W = torch.zeros(6, 4)
    for own in (W, W.mT, W[::2], W[:, 1:3], W[:1], W[:, :1], W.mT[1:3]):
        assert not pk.ops.has_overlap(own)
    for shared in (W[:1].expand(6, 4), W[:, :1].expand(6, 4), W.flatten().unfold(0, 4, 2)):
        assert pk.ops.has_overlap(shared)
