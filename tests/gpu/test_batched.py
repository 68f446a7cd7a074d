"""The operations on batches on real sizes: accuracy, the same bits alone and in a batch, and no wait for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pissa_kernels.ops import batched_reference, dispatch, reference
from pissa_kernels.ops.batched import Panel, Update, Weights

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(4096, 11008), (1000, 3000)]
WIDTHS = [64, 160, 192, 256, 448]  # of the panels of the fixed schedules
# Error of an element relative to the product of the absolute values, by the number of pieces; of TF32 for one piece.
ROUNDOFF = {1: 2.0**-9, 2: 2.0**-17, 3: 2.0**-22}
UNIT_ROUNDOFF = 2.0**-24


@pytest.fixture(params=DTYPES)
def tensors(request: pytest.FixtureRequest) -> list[Tensor]:
    """Three weights of one of the dtypes, wide and with as many rows as a model's."""
    return [randn(*SHAPES[0], seed=seed).to(request.param) for seed in range(3)]


def randn(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def bodies(weights: Weights) -> Any:
    """Triton's operations, which must be the default on a CUDA device that has them."""
    reasons = dispatch.unsupported_reasons("matmul", weights.tensors[0])["triton"]
    if reasons:
        pytest.skip(f"triton: {'; '.join(reasons)}")
    found = dispatch.bodies(weights)
    assert found is not batched_reference
    return found


@contextlib.contextmanager
def asynchronous() -> Iterator[None]:
    """Raise where torch waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def norm(error: Tensor) -> float:
    return float(error.double().norm())


def test_a_wait_for_the_device_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), asynchronous():
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("precision", [1, 2, 3])
def test_products_of_weights_by_address(tensors: list[Tensor], precision: int, columns: int) -> None:
    batch = Weights.of(tensors)
    product = bodies(batch).product
    for weights in (batch, batch.mT):
        X = randn(3, weights.shape[2], columns)
        with asynchronous():
            got = product(weights, X, precision=precision, pieces=2)
        for index, W in enumerate(weights.tensors):
            exact = W.double() @ X[index].double()
            error = got.values[index].double() - exact
            if precision == 3:
                assert norm(error) <= 2 * norm(reference.matmul(W, X[index]).double() - exact)
            assert (error.abs() <= 2 * ROUNDOFF[precision] * (W.double().abs() @ X[index].double().abs())).all()
            alone = product(Weights.of([W]), X[index : index + 1], precision=precision, pieces=2)
            assert torch.equal(alone.values[0], got.values[index])
            assert torch.equal(alone.pieces[:, 0], got.pieces[:, index])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("columns", [64, 192, 200])
def test_a_filter_of_pieces(shape: tuple[int, int], columns: int) -> None:
    """W·X and Wᵀ·(W·X) as the recurrence takes them, by pieces alone; neither 1000 nor 3000 has whole blocks."""
    weights = Weights.of([randn(*shape, seed=seed).bfloat16() for seed in range(3)])
    operations = bodies(weights)
    X, previous = randn(3, shape[1], columns), randn(3, shape[1], columns, seed=8)
    alpha = torch.tensor([1e-4, 2e-4, 1.0], device="cuda")
    update = Update(alpha, beta=-1.25, current=X, gamma=0.5, previous=previous)
    with asynchronous():
        image = operations.product(weights, Panel(X, operations.split(X, 2)), precision=2, values=False, pieces=2)
        got = operations.product(weights.mT, image, precision=2, update=update, pieces=1)
    assert image.values is None
    assert torch.equal(got.pieces[0], got.values.bfloat16())
    for index, W in enumerate(weights.tensors):
        Y = image.pieces[:, index].double().sum(0)
        exact, magnitude = W.double() @ X[index].double(), W.double().abs() @ X[index].double().abs()
        assert ((Y - exact).abs() <= 4 * ROUNDOFF[2] * magnitude).all()
        exact = alpha[index] * (W.double().mT @ Y) - 1.25 * X[index].double() + 0.5 * previous[index].double()
        magnitude = alpha[index] * (W.double().abs().mT @ Y.abs()) + 1.25 * X[index].abs() + 0.5 * previous[index].abs()
        assert ((got.values[index] - exact).abs() <= 2 * ROUNDOFF[2] * magnitude).all()


@pytest.mark.parametrize("columns", WIDTHS)
def test_gram_matrices_and_changes_of_basis(columns: int) -> None:
    product = bodies(Weights.of([randn(2, 2)])).product
    Z, change = randn(3, 11008, columns), randn(3, columns, columns, seed=8)
    for left, right in ((Z.mT, Z), (Z, change)):
        with asynchronous():
            got = product(left, right, precision=3).values
        exact = left.double() @ right.double()
        theirs = torch.stack([one @ other for one, other in zip(left, right, strict=True)])
        assert norm(got.double() - exact) <= 2 * norm(theirs.double() - exact)
        for index in range(3):
            one = slice(index, index + 1)
            assert torch.equal(product(left[one], right[one], precision=3).values[0], got[index])


def test_splits() -> None:
    X = randn(3, 11008, 200)
    split = bodies(Weights.of([randn(2, 2)])).split
    with asynchronous():
        pieces = split(X, 3)
    assert torch.equal(pieces, batched_reference.split(X, 3))


def test_sums_of_squares(tensors: list[Tensor]) -> None:
    batch = Weights.of(tensors)
    sum_of_squares = bodies(batch).sum_of_squares
    exact = torch.stack([W.double().square().sum() for W in tensors])
    for weights in (batch, batch.mT):
        with asynchronous():
            got = sum_of_squares(weights)
        assert ((got - exact).abs() <= 1e-6 * exact).all()
        for index, W in enumerate(weights.tensors):
            assert torch.equal(sum_of_squares(Weights.of([W]))[0], got[index])


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [16, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_subtraction(tensors: list[Tensor], rank: int, transposed: bool, factor_dtype: torch.dtype) -> None:
    def copies() -> Weights:
        batch = Weights.of([W.clone() for W in tensors])
        return batch.mT if transposed else batch

    weights, torchs = copies(), copies()
    subtract = bodies(weights).subtract_lowrank_
    _, m, n = weights.shape
    B, A = randn(3, m, rank).to(factor_dtype), randn(3, rank, n, seed=8).to(factor_dtype)
    scalings = torch.tensor([0.7, 2.0, 1e-3], dtype=torch.float64)
    exact = [W.double() - float(s) * (b.double() @ a.double())
             for W, s, b, a in zip(weights.tensors, scalings, B, A, strict=True)]  # fmt: skip
    batched_reference.subtract_lowrank_(torchs, B, A, scalings)
    with asynchronous():
        subtract(weights, B, A, scalings)
    for index, W in enumerate(weights.tensors):
        assert norm(W.double() - exact[index]) <= 1.1 * norm(torchs.tensors[index].double() - exact[index])
        one = slice(index, index + 1)
        alone = copies().tensors[index]
        subtract(Weights.of([alone]), B[one], A[one], scalings[one])
        assert torch.equal(alone, W)


@pytest.mark.parametrize("columns", WIDTHS)
def test_cholesky_factorizations(columns: int) -> None:
    inverse_cholesky = bodies(Weights.of([randn(2, 2)])).inverse_cholesky
    Z = randn(5, 4096, columns) * torch.logspace(0, -3, columns, device="cuda")
    Z[3, :, 7] = 0.0
    gram = (Z.double().mT @ Z.double()).float()
    gram[4, 35, 3] = gram[4, 3, 35] = 2 * gram[4].diagonal().amax()  # not definite
    shift = 1e-6
    with asynchronous():
        got = inverse_cholesky(gram, shift)
    theirs = batched_reference.inverse_cholesky(gram, shift)
    exact = batched_reference.inverse_cholesky(gram.double(), shift)
    for ours, torchs, true in zip(got, theirs, exact, strict=True):
        assert ours[4].isnan().all()
        for index in range(4):
            error = norm(torchs[index] - true[index]) + UNIT_ROUNDOFF * norm(true[index])
            assert norm(ours[index] - true[index]) <= 2 * error
    assert not got[0][3, :, 7].any()
    assert torch.equal(got[0][:4], got[0][:4].triu())
    for index in range(4):
        for whole, alone in zip(got, inverse_cholesky(gram[index : index + 1], shift), strict=True):
            assert torch.equal(alone[0], whole[index])


@pytest.mark.parametrize("columns", WIDTHS)
def test_eigenvalues_and_eigenvectors(columns: int) -> None:
    eigh = bodies(Weights.of([randn(2, 2)])).eigh
    matrices = randn(4, columns, columns)
    matrices = matrices + matrices.mT
    matrices[1] = torch.diag(torch.logspace(0, -5, columns, device="cuda")) + 1e-5 * matrices[1]  # nearly diagonal
    matrices[2] = matrices[2] @ matrices[2].mT  # positive definite
    matrices[2] = (matrices[2] + matrices[2].mT) / 2
    matrices[3, 5, 9] = torch.nan
    with asynchronous():
        values, vectors = eigh(matrices)
    assert values[3].isnan().all()
    assert vectors[3].isnan().all()
    bound = 10 * columns * UNIT_ROUNDOFF  # LAPACK's own tests pass up to 30 round-offs for each row
    for index in range(3):
        matrix, vector = matrices[index].double(), vectors[index].double()
        largest = torch.linalg.matrix_norm(matrix, 2)
        assert (values[index].diff() <= 0).all()
        assert ((values[index].flip(0) - torch.linalg.eigvalsh(matrix)).abs() <= bound * largest).all()
        assert (torch.linalg.vector_norm(matrix @ vector - vector * values[index], dim=0) <= bound * largest).all()
        assert ((vector.mT @ vector - torch.eye(columns, device="cuda")).abs() <= bound).all()
        for whole, alone in zip((values, vectors), eigh(matrices[index : index + 1]), strict=True):
            assert torch.equal(alone[0], whole[index])
