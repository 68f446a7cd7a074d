"""The operators' products against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa_kernels.svd.operators import GramOperator, Operator, WeightOperator

from ..support.reference import EPS, realistic


def batch_of(shape: tuple[int, int], scales: tuple[float, ...]) -> Tensor:
    return torch.stack([realistic(*shape, seed=seed) * scale for seed, scale in enumerate(scales)])


def exact_H(operator: WeightOperator, weights: Tensor) -> Tensor:
    A = weights.double().mT if operator.wide else weights.double()
    A = A if operator.scale is None else A * operator.scale.double()
    return A.mT @ A


@pytest.mark.parametrize("through_gram", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 3.0), (1.0, 1e30, 1e-30)])
@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_products_are_those_of_H(shape: tuple[int, int], scales: tuple[float, ...], through_gram: bool) -> None:
    weights = batch_of(shape, scales).float()
    weight_operator = WeightOperator(weights)
    H = exact_H(weight_operator, weights)
    operator: Operator = weight_operator
    if through_gram:
        operator = GramOperator(weight_operator.gram(torch.float32), weight_operator.shape[1])
    assert operator.shape == (len(scales), 90, 60)
    X = torch.randn(len(scales), 60, 4, generator=torch.Generator().manual_seed(0))
    exact = H @ X.double()
    projected = X.double().mT @ exact
    projection = operator.project(X)
    norms = H.norm(dim=(1, 2), keepdim=True) * X.double().norm(dim=(1, 2), keepdim=True)
    for got in (operator.multiply(X), projection.HQ):
        assert ((got - exact).abs() <= 20 * EPS * norms).all()
    for got in (projection.matrix, operator.compress(X)[0]):
        assert ((got - projected).abs() <= 20 * EPS * norms * 16).all()


def test_every_weight_of_a_batch_starts_from_the_same_sketch() -> None:
    weights = batch_of((50, 40), (1.0, 2.0)).float()
    together = WeightOperator(weights).sketch(5, seed=3)
    for index in range(2):
        alone = WeightOperator(weights[index : index + 1]).sketch(5, seed=3)
        torch.testing.assert_close(together[index], alone[0], rtol=1e-5, atol=1e-5)


def test_passes_count_products_with_A_and_its_transpose() -> None:
    operator = WeightOperator(batch_of((50, 40), (1.0, 2.0)).float())
    X = torch.ones(2, 40, 3)
    operator.sketch(3, 0)
    operator.multiply(X)
    operator.project(X)
    operator.compress(X)
    operator.adjoint(operator.apply(X))
    assert operator.passes == 1 + 2 + 2 + 1 + 2


def test_project_and_compress_return_A_times_the_panel() -> None:
    weights = batch_of((50, 40), (1.0,)).bfloat16()
    operator = WeightOperator(weights)
    X = torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0))
    for AQ in (operator.project(X).AQ, operator.compress(X)[1]):
        torch.testing.assert_close(AQ, weights.float() @ X, rtol=1e-5, atol=1e-5)
