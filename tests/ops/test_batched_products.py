"""Products of batches of weights by address and of stacked matrices, against float64 and against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pissa_kernels.ops import batched_reference
from pissa_kernels.ops.batched import Panel, Update, Weights

from ..support.backends import DEVICE, DTYPES, LAYOUTS, randn
from .test_verbs import layouts

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=["triton", "torch"])
def bodies(request: pytest.FixtureRequest) -> Any:
    """Each module of batched operations."""
    if request.param == "torch":
        return batched_reference
    request.getfixturevalue("triton_backend")
    return pytest.importorskip("pissa_kernels.ops.triton.batched")


def weights(count: int, m: int, n: int, dtype: torch.dtype, layout: str = "row") -> Weights:
    return Weights.of([layouts(randn(m, n, seed=seed).to(dtype))[layout] for seed in range(count)])


def exact_products(left: Weights | Tensor, panel: Tensor) -> Tensor:
    matrices = left.tensors if isinstance(left, Weights) else left.unbind()
    return torch.stack([matrix.double() for matrix in matrices]) @ panel.double()


def float_products(left: Weights | Tensor, panel: Tensor) -> Tensor:
    matrices = left.tensors if isinstance(left, Weights) else left.unbind()
    return torch.stack([matrix.float() @ X for matrix, X in zip(matrices, panel, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_by_address_in_float32(dtype: torch.dtype, layout: str, bodies: Any) -> None:
    for m, n, columns in ((1, 17, 1), (130, 63, 5), (65, 150, 40)):
        lefts = [weights(3, m, n, dtype, layout)]
        if layout == "strided":  # the transposes of the others are each other
            lefts.append(weights(3, n, m, dtype, layout).mT)
        for left in lefts:
            X = randn(3, n, columns, seed=9)
            exact = exact_products(left, X)
            panel = Panel(X, bodies.split(X, 3)) if dtype == torch.bfloat16 else Panel(X, None)
            got = bodies.product(left, panel, precision=3)
            assert got.pieces is None
            assert got.values.shape == exact.shape
            assert got.values.is_contiguous()
            torchs = (float_products(left, X) - exact).norm()
            assert (got.values - exact).norm() <= 1.1 * torchs + exact.norm() * 2.0**-24, (m, n)
            if columns == 5 and bodies is not batched_reference:
                assert torch.equal(bodies.product(left, X, precision=3).values, got.values)


@pytest.mark.parametrize(("inner", "columns"), [(64, 150), (64, 192), (64, 260), (70, 192)])
def test_tiles_of_many_columns(inner: int, columns: int, bodies: Any) -> None:
    left, X = weights(1, 20, inner, torch.bfloat16), randn(1, inner, columns, seed=9).bfloat16().float()
    panel = Panel(None, X.bfloat16()[None])
    exact = exact_products(left, X)
    torchs = (float_products(left, X) - exact).norm()
    assert (bodies.product(left, panel, precision=1).values - exact).norm() <= 1.1 * torchs


@pytest.mark.parametrize(("precision", "roundoff"), [(1, 2.0**-9), (2, 2.0**-17), (3, 2.0**-24)])
def test_the_precision_is_the_number_of_pieces_that_are_used(precision: int, roundoff: float, bodies: Any) -> None:
    left, X = weights(2, 40, 100, torch.bfloat16), randn(2, 100, 20, seed=9)
    panel = Panel(None, bodies.split(X, 3))
    exact = exact_products(left, X)
    magnitude = torch.stack([W.double().abs() for W in left.tensors]) @ X.double().abs()
    error = (bodies.product(left, panel, precision=precision).values - exact).abs()
    assert (error <= (roundoff + 100 * 2.0**-24) * magnitude).all()
    if precision < 3:
        assert error.norm() > 4 * (bodies.product(left, panel, precision=precision + 1).values - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", [1, 2, 3])
def test_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype, precision: int, bodies: Any) -> None:
    left, X = weights(3, 140, 80, dtype), randn(3, 80, 24, seed=9)
    panel = Panel(X, bodies.split(X, 3))
    assert panel.pieces is not None
    got = bodies.product(left, panel, precision=precision, pieces=2)
    for index, W in enumerate(left.tensors):
        one = slice(index, index + 1)
        alone = Panel(X[one], panel.pieces[:, one])
        alone = bodies.product(Weights.of([W]), alone, precision=precision, pieces=2)
        assert torch.equal(alone.values[0], got.values[index])
        assert torch.equal(alone.pieces[:, 0], got.pieces[:, index])


def test_a_panel_shared_by_the_batch(bodies: Any) -> None:
    left, X = weights(3, 40, 80, torch.bfloat16), randn(1, 80, 24, seed=9)
    pieces = bodies.split(X, 2)
    shared = Panel(None, pieces.expand(-1, 3, -1, -1))
    own = Panel(None, pieces.repeat(1, 3, 1, 1))
    assert torch.equal(bodies.product(left, shared, precision=2).values, bodies.product(left, own, precision=2).values)


def test_gram_matrices_and_changes_of_basis(bodies: Any) -> None:
    Z = randn(2, 300, 20, seed=9)
    small = randn(2, 20, 20, seed=8).mT
    for left, right in ((Z.mT, Z), (Z, small), (Z[:, ::2].mT, Z[:, 1::2])):
        exact = exact_products(left, right)
        torchs = (float_products(left, right) - exact).norm()
        got = bodies.product(left, right, precision=3, pieces=1)
        assert (got.values - exact).norm() <= 1.1 * torchs + exact.norm() * 2.0**-24
        assert torch.equal(got.pieces[0], got.values.bfloat16())


@pytest.mark.parametrize("terms", ["scale", "current", "previous", "both"])
def test_the_update(terms: str, bodies: Any) -> None:
    left, X = weights(3, 70, 50, torch.bfloat16), randn(3, 50, 36, seed=9)
    alpha = torch.tensor([0.5, -3.0, 0.0], device=DEVICE)
    current, previous = randn(3, 70, 36, seed=7), randn(3, 70, 36, seed=6)
    update = Update(
        alpha,
        beta=-1.25 if terms in ("current", "both") else 0.0,
        current=current if terms in ("current", "both") else None,
        gamma=0.75 if terms in ("previous", "both") else 0.0,
        previous=previous if terms in ("previous", "both") else None,
    )

    def updated(product: Tensor) -> Tensor:
        scale = alpha[:, None, None].to(product.dtype)
        return scale * product + update.beta * current.to(product.dtype) + update.gamma * previous.to(product.dtype)

    exact = updated(exact_products(left, X))
    torchs = (updated(float_products(left, X)) - exact).norm()
    got = bodies.product(left, X, precision=3, update=update, pieces=2)
    assert (got.values - exact).norm() <= 1.1 * torchs + exact.norm() * 2.0**-24
    assert torch.equal(got.pieces, batched_reference.split(got.values, 2))
    only = bodies.product(left, X, precision=3, update=update, values=False, pieces=3)
    assert only.values is None
    assert torch.equal(only.pieces[:2], got.pieces)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_zeros_and_extreme_numbers(scale: float, bodies: Any) -> None:
    left = weights(2, 40, 60, torch.bfloat16)
    X = randn(2, 60, 12, seed=9) * scale
    exact = exact_products(left, X)
    got = bodies.product(left, X, precision=3).values
    assert (got - exact).norm() <= 4 * 2.0**-24 * exact.norm()


def test_nan_stays_in_its_matrix(bodies: Any) -> None:
    left, X = weights(3, 40, 60, torch.bfloat16), randn(3, 60, 12, seed=9)
    left.tensors[1][39, 59] = torch.nan
    got = bodies.product(left, X, precision=2, pieces=2)
    for result in (got.values, got.pieces[0]):
        assert result[[0, 2]].isfinite().all()
        assert result[1, 39].isnan().all()
        assert result[1, :39].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "columns"), [(0, 5, 3), (5, 0, 3), (5, 4, 0)])
def test_empty_products(dtype: torch.dtype, m: int, n: int, columns: int, bodies: Any) -> None:
    left, X = weights(2, m, n, dtype), randn(2, n, columns)
    got = bodies.product(left, X, precision=2, pieces=2)
    assert torch.equal(got.values, torch.zeros(2, m, columns, device=DEVICE))
    assert got.pieces.shape == (2, 2, m, columns)
    assert not got.pieces.any()


def test_splits(bodies: Any) -> None:
    for X in (randn(3, 50, 30), randn(30, 50).mT, randn(3000) * 1e-38, randn(2, 0, 3)):
        pieces = bodies.split(X, 3)
        assert torch.equal(pieces, batched_reference.split(X, 3))
        assert torch.equal(pieces[:2], bodies.split(X, 2))
        assert ((pieces.double().sum(0) - X).abs() <= 2.0**-24 * X.abs() + 2.0**-133).all()
