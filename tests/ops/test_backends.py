"""Every faster backend against float64, with the reference verb's own error as the yardstick.

On a machine without a GPU Triton's kernels run under its interpreter, csrc's on the CPU where they were built.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.ops import dispatch, reference

from ..support.reference import ROUNDOFF
from .test_verbs import layouts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = [(1, 1), (1, 17), (17, 1), (63, 130), (130, 63)]
LARGE = [(300, 257), (4097, 33), (33, 4097)]
# Elements from which an error is no longer a matter of luck.
MANY = 1000
LAYOUTS = ["row", "column", "strided"]
FASTER = ["csrc", "triton"]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=FASTER)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the faster backends, forced."""
    name: str = request.param
    reasons = pk.ops.unsupported_reasons("transpose_cast", torch.ones(2, 2, device=DEVICE))[name]
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    monkeypatch.setenv(dispatch.VARIABLE, name)
    return name


def shapes(backend: str, layout: str) -> list[tuple[int, int]]:
    """The interpreter takes a second for a large weight: it sees them in one layout."""
    return SMALL + LARGE if backend == "csrc" or DEVICE == "cuda" or layout == "strided" else SMALL


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transpose_cast_is_torchs(source: torch.dtype, target: torch.dtype, layout: str, backend: str) -> None:
    for shape in shapes(backend, layout):
        W = layouts(randn(*shape).to(source))[layout]
        got = pk.ops.transpose_cast(W, target)
        assert got.is_contiguous()
        assert torch.equal(got, W.mT.to(target)), shape


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
            theirs = reference.subtract_lowrank_(dense.clone(), B, A, 0.7, fan_in_fan_out)
            assert (W - exact).norm() <= 1.1 * (theirs - exact).norm(), shape
        if layout == "strided":  # the neighbours of a slice are not its own
            outside[::2, 2 : shape[1] + 2] = W
            assert torch.equal(whole, outside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [128, 512])
def test_subtraction_at_high_ranks(dtype: torch.dtype, rank: int, backend: str) -> None:
    dense, B, A = randn(200, 150).to(dtype), randn(200, rank, seed=2), randn(rank, 150, seed=3)
    exact = dense.double() - 1.5 * (B.double() @ A.double())
    got = pk.ops.subtract_lowrank_(dense.clone(), B, A, 1.5)
    theirs = reference.subtract_lowrank_(dense.clone(), B, A, 1.5)
    assert (got - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["torch", "csrc"])
def test_squares_are_summed_to_float32(
    dtype: torch.dtype, layout: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in SMALL + LARGE:
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
            pk.ops.sum_of_squares(W), W.double().square().sum((1, 2)), rtol=1e-6, atol=0, msg="rows of one memory"
        )
    for bad in (math.nan, math.inf):
        W = layouts(
            randn(63, 130).to(dtype).index_put_((torch.tensor(62), torch.tensor(129)), torch.tensor(bad).to(dtype))
        )
        assert not pk.ops.sum_of_squares(W[layout][None]).isfinite().any()
    with pytest.raises(ValueError, match="must be a stack"):
        pk.ops.sum_of_squares(randn(3, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_need_no_layout_of_their_own(transposed: bool, backend: str) -> None:
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
    turned = dispatch.load(name).transpose_cast(W, torch.float32)
    assert torch.equal(turned, W.mT.float())
    dispatch.load(name).subtract_lowrank_(W, B, A, 2.0)
    assert ((W.double() - exact).abs() <= bound).all()


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
            own = (getattr(reference, verb)(W, P) - exact).norm() + exact.norm() * 2.0**-24
            assert (got - exact).norm() <= 1.1 * own, (verb, shape)
        first, second = pk.ops.normal(W, X)
        assert first.is_contiguous()
        assert second.is_contiguous()
        assert torch.equal(first, pk.ops.matmul(W, X))
        if backend == "triton":  # csrc sums over the rows of each thread first
            assert torch.equal(second, pk.ops.rmatmul(W, first))
        exact = dense.double().mT @ first.double()
        own = (reference.rmatmul(W, first) - exact).norm() + exact.norm() * 2.0**-24
        assert (second - exact).norm() <= 1.1 * own, shape


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = pk.ops.unsupported_reasons("matmul", torch.ones(2, 2, device=DEVICE))["triton"]
    if reasons:
        pytest.skip("; ".join(reasons))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")


@pytest.fixture
def csrc_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = pk.ops.unsupported_reasons("matmul", torch.ones(2, 2))["csrc"]
    if reasons:
        pytest.skip("; ".join(reasons))
    monkeypatch.setenv(dispatch.VARIABLE, "csrc")


@settings(max_examples=60, deadline=None)
@given(
    batch=st.sampled_from([0, 0, 1, 3]),
    m=st.integers(0, 150),
    n=st.integers(0, 300),
    columns=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    threads=st.integers(1, 3),
)
def test_products_of_any_shape_are_within_their_roundoff(
    batch: int, m: int, n: int, columns: int, dtype: torch.dtype, layout: str, threads: int
) -> None:
    weights = [layouts(randn(m, n, seed=seed).cpu().to(dtype))[layout] for seed in range(max(batch, 1))]
    W = torch.stack([weight.mT for weight in weights]).mT if layout == "column" else torch.stack(weights)
    W = W if batch else weights[0]
    X = randn(*W.shape[:-2], columns, n, seed=8).cpu().mT  # a panel that is not contiguous
    Y = randn(*W.shape[:-1], columns, seed=9).cpu()
    if dispatch.unsupported_reasons("matmul", W)["csrc"]:
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        csrc = dispatch.load("csrc")
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


@pytest.mark.usefixtures("csrc_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1500, 2900), (11000, 200), (200, 11000), (40000, 96)])
@pytest.mark.parametrize("columns", [8, 24, 200])
def test_csrcs_products_of_long_sums(
    dtype: torch.dtype, transposed: bool, shape: tuple[int, int], columns: int
) -> None:
    W = randn(*shape).to(dtype)
    W = W.mT if transposed else W
    X = randn(W.shape[1], columns, seed=2)
    Y, Z = pk.ops.normal(W, X)
    for verb, A, P, got in (("matmul", W.double(), X, Y), ("rmatmul", W.double().mT, Y, Z)):
        exact = A @ P.double()
        own = (getattr(reference, verb)(W, P) - exact).norm()
        assert (got - exact).norm() <= 1.1 * own, verb
        assert (getattr(pk.ops, verb)(W, P) - exact).norm() <= 1.1 * own, verb


@pytest.mark.usefixtures("csrc_backend")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["weight", "panel"])
def test_what_is_not_finite_shows_where_it_does_in_the_reference(transposed: bool, value: float, where: str) -> None:
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
def test_fewer_pieces_keep_their_bound(dtype: torch.dtype, pieces: int, roundoff: float) -> None:
    W, X = randn(200, 300).to(dtype), randn(300, 20, seed=2)
    exact = W.double() @ X.double()
    magnitude = W.double().abs() @ X.double().abs()
    error = (pk.ops.matmul(W, X, pieces=pieces) - exact).abs()
    assert (error <= (roundoff + 300 * 2**-24) * magnitude).all()
    # and they are what was asked for, not more
    assert error.norm() > 4 * (pk.ops.matmul(W, X, pieces=pieces + 1) - exact).norm()


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_and_split_sums(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pissa_kernels.ops.triton import product

    W = randn(3, 40, 1300).bfloat16()
    W, X = (W.mT, randn(3, 40, 7)) if transposed else (W, randn(3, 1300, 7))
    exact = W.double() @ X.double()
    for multiprocessors in (1, 132):
        monkeypatch.setattr(product, "multiprocessors", lambda device, count=multiprocessors: count)
        got = pk.ops.matmul(W, X)
        assert (got - exact).norm() <= 1.1 * (reference.matmul(W, X) - exact).norm()
    assert product.splits(3, 1300, 64, W.device) == 4


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("verb", ["matmul", "rmatmul"])
def test_grouped_products_of_any_shapes(dtype: torch.dtype, verb: str) -> None:
    shapes = [(64, 48), (1, 17), (130, 63), (16, 16), (1, 16), (16, 1), (0, 5)]
    for kind in ("row", "column", "mixed"):
        weights, panels = [], []
        for seed, shape in enumerate(shapes):
            W = randn(*shape, seed=seed).to(dtype)
            turned = kind == "column" or (kind == "mixed" and seed % 2)
            weights.append(W.mT.contiguous().mT if turned else W)
            panels.append(randn(shape[1 if verb == "matmul" else 0], 16, seed=seed + 50))
        grouped = getattr(pk.ops, f"grouped_{verb}")
        for W, P, got in zip(weights, panels, grouped(weights, panels), strict=True):
            A = W if verb == "matmul" else W.mT
            exact = A.double() @ P.double()
            own = (A.float() @ P - exact).norm() + exact.norm() * 2.0**-24
            assert got.shape == exact.shape
            assert (got - exact).norm() <= 1.1 * own, (kind, W.shape)
    assert grouped([], []) == []


@pytest.mark.parametrize(
    ("weights", "panels", "words"),
    [
        ([torch.ones(3, 2)], [], "1 weights and 0 panels"),
        ([torch.ones(3, 2)], [torch.ones(3, 2)], r"takes a panel \(2, k\)"),
        ([torch.ones(3, 2), torch.ones(3, 2).half()], [torch.ones(2, 4)] * 2, "weight 1 is torch.float16"),
        ([torch.ones(3, 2)] * 2, [torch.ones(2, 4), torch.ones(2, 5)], "panel of 5 columns; the first is"),
    ],
)
def test_groups_that_do_not_fit_are_refused(weights: list[Tensor], panels: list[Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pk.ops.grouped_matmul(weights, panels)


@pytest.mark.skipif(DEVICE == "cuda", reason="the address space of a CPU, without its memory")
def test_offsets_beyond_32_bits(backend: str) -> None:
    rows, stride = 3, 3 * 2**29  # the last row begins at element 3·2³⁰
    noreserve = 0x4000  # Linux's MAP_NORESERVE: addresses, and pages only where they are touched
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
        assert torch.equal(pk.ops.grouped_matmul([W], [X])[0], pk.ops.matmul(dense, X))
