"""The operators' products against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa_kernels.svd.operators import GramOperator, Operator
from pissa_kernels.svd.weight_operator import WeightOperator

from ..support.reference import EPS, realistic


def exact_H(operator: WeightOperator, weight: Tensor) -> Tensor:
    A = weight.double().mT if operator.wide else weight.double()
    A = A * operator.scale
    return A.mT @ A


@pytest.mark.parametrize("through_gram", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0, 1e30, 1e-30])
@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_products_are_those_of_H(shape: tuple[int, int], scale: float, through_gram: bool) -> None:
    weight = (realistic(*shape) * scale).float()
    weight_operator = WeightOperator(weight)
    assert (weight_operator.scale != 1.0) == (scale in (1e30, 1e-30))
    H = exact_H(weight_operator, weight)
    operator: Operator = weight_operator
    if through_gram:
        operator = GramOperator(weight_operator.gram(torch.float32), weight_operator.shape[0])
    assert operator.shape == (90, 60)
    X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    exact = H @ X.double()
    projected = X.double().mT @ exact
    projection = operator.project(X)
    norms = H.norm() * X.double().norm()
    assert ((projection.HQ - exact).abs() <= 20 * EPS * norms).all()
    for got in (projection.matrix, operator.compress(X)[0]):
        assert ((got - projected).abs() <= 20 * EPS * norms * 16).all()
    edge = float(H.norm())
    filtered = operator.filter(X, exact.float(), edge, 3, 3)
    Y = 2 / edge * exact - X.double()  # T_3(x) = 4x³ − 3x with x = 2H/edge − 1
    twice = 2 / edge * (H @ Y) - Y
    assert ((filtered - 4 * (2 / edge * (H @ twice) - twice) + 3 * Y).abs() <= 100 * EPS * X.norm()).all()


@pytest.mark.parametrize("through_gram", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_ritz_pairs_are_those_of_H(scale: float, through_gram: bool) -> None:
    weight = (realistic(90, 60) * scale).float()
    weight_operator = WeightOperator(weight)
    H = exact_H(weight_operator, weight)
    operator: Operator = weight_operator
    if through_gram:
        operator = GramOperator(weight_operator.gram(torch.float32), 90)
    Z = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    X, HX, figures = operator.ritz(Z, 3)
    values, residuals = figures[:8], figures[8:11]
    Q = torch.linalg.qr(Z.double())[0]
    exact = torch.linalg.eigvalsh(Q.mT @ H @ Q)
    largest = exact.abs().max()
    assert (values - exact).abs().max() <= 20 * EPS * largest
    assert (HX - H @ X.double()).abs().max() <= 20 * EPS * H.norm()
    wanted = (H @ X[:, -3:].double() - X[:, -3:].double() * exact[-3:]).norm(dim=0)
    assert (residuals - wanted).abs().max() <= 50 * EPS * H.norm()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_the_residuals_of_triplets(scale: float, known: bool) -> None:
    weight = (realistic(90, 60) * scale).float()
    operator = WeightOperator(weight)
    A = weight.double() * operator.scale
    generator = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(60, 4, generator=generator))[0]
    U, W, figures = operator.triplets(V, 3, operator.apply(V) if known else None)
    S, residuals = figures[:4], figures[4:7]
    sizes = torch.linalg.svdvals(A @ V.double())
    assert (S - sizes).abs().max() <= 10 * EPS * sizes[0]
    S = S[:3]
    left, right = (A @ W.double() - U * S).norm(dim=0), (A.mT @ U.double() - W * S).norm(dim=0)
    assert left.max() <= 20 * EPS * A.norm()
    assert (residuals - torch.maximum(left, right)).abs().max() <= 20 * EPS * A.norm()
    assert (operator.residuals(U, S, W, operator.apply(W)) - residuals).abs().max() <= 20 * EPS * A.norm()


def test_passes_count_products_with_A_and_its_transpose() -> None:
    operator = WeightOperator(realistic(50, 40).float())
    X = torch.ones(40, 3)
    operator.sketch(3, 0)
    operator.filter(X, X, 1.0, 3, 3)
    operator.ritz(X, 1)
    operator.project(X)
    operator.compress(X)
    Y = operator.apply(X)
    operator.adjoint(Y)
    operator.triplets(X, 1, Y)
    operator.triplets(X, 1)
    operator.residuals(Y, torch.ones(3), X, Y)
    assert operator.passes == 1 + 4 + 2 + 2 + 1 + 2 + 1 + 2 + 1


def test_project_and_compress_return_A_times_the_panel() -> None:
    weight = realistic(50, 40).bfloat16()
    operator = WeightOperator(weight)
    X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    for AQ in (operator.project(X).AQ, operator.compress(X)[1]):
        torch.testing.assert_close(AQ, weight.float() @ X, rtol=1e-5, atol=1e-5)
