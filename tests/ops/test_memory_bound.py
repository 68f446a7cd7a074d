"""Subtractions and sums of squares of batches of weights by address, in Triton and in torch, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pissa_kernels.ops import batched_reference
from pissa_kernels.ops.batched import Weights

from ..support.backends import DEVICE, DTYPES, randn
from ..support.reference import ROUNDOFF
from .conftest import force

pytestmark = pytest.mark.usefixtures("poison")
LAYOUTS = ["row", "column", "strided", "unaligned"]
# dtypes of the weights and of their factors
FACTORS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float16),
]


@pytest.fixture(params=["triton", "torch"])
def bodies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions of one implementation."""
    if request.param == "torch":
        return batched_reference
    force("triton", "matmul", DEVICE, monkeypatch)
    from pissa_kernels.ops.triton.subtract_lowrank import subtract_lowrank_batched_
    from pissa_kernels.ops.triton.sum_of_squares import sum_of_squares_batched

    return SimpleNamespace(subtract_lowrank_=subtract_lowrank_batched_, sum_of_squares=sum_of_squares_batched)


def stored(values: Sequence[Tensor], layout: str) -> list[Tensor]:
    """Weights of these values (m, n), in one layout."""
    m, n = values[0].shape
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "row": lambda buffer: buffer[: m * n].view(m, n),
        "column": lambda buffer: buffer[: m * n].view(n, m).mT,
        "strided": lambda buffer: buffer[: 2 * m * (n + 5)].view(2 * m, n + 5)[::2, 2 : n + 2],
        "unaligned": lambda buffer: buffer[1 : m * n + 1].view(m, n),
    }
    weights = []
    for each in values:
        weight = views[layout](each.new_zeros(2 * m * (n + 5)))
        weight.copy_(each)
        weights.append(weight)
    return weights


def factors(batch: int, m: int, n: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(batch, m, rank, seed=2).to(dtype), randn(batch, rank, n, seed=3).to(dtype)


@pytest.mark.parametrize("dtypes", FACTORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_subtracted_with_one_rounding(
    dtypes: tuple[torch.dtype, torch.dtype], layout: str, bodies: Any
) -> None:
    dtype, factor_dtype = dtypes
    m, n, rank = (136, 72, 48) if layout == "row" else (131, 75, 19)
    dense = randn(3, m, n).to(dtype)
    B, A = factors(3, m, n, rank, factor_dtype)
    scalings = torch.tensor([0.7, 0.7, 0.7] if layout == "row" else [0.7, 2.0, 1e-3], dtype=torch.float64)
    weights = stored(dense.unbind(), layout)
    versions = [weight._version for weight in weights]
    outside = [weight._base.clone() for weight in weights if weight._base is not None]
    bodies.subtract_lowrank_(Weights.of(weights), B, A, scalings)
    assert all(weight._version > version for weight, version in zip(weights, versions, strict=True))
    exact = dense.double() - scalings[:, None, None] * (B.double() @ A.double())
    magnitude = dense.double().abs() + scalings[:, None, None] * (B.double().abs() @ A.double().abs())
    bound = ROUNDOFF[dtype] * exact.abs() * (1 + ROUNDOFF[dtype]) + (rank + 3) * 2**-24 * magnitude
    assert ((torch.stack(weights).double() - exact).abs() <= bound).all()
    for weight, whole in zip(weights, outside, strict=True):  # elements beside the weight are unchanged
        whole.as_strided(weight.shape, weight.stride(), weight.storage_offset()).copy_(weight)
        assert weight._base is not None
        assert torch.equal(whole, weight._base)


@pytest.mark.parametrize("dtypes", FACTORS)
def test_a_weight_has_the_same_residual_in_every_batch(dtypes: tuple[torch.dtype, torch.dtype], bodies: Any) -> None:
    dtype, factor_dtype = dtypes
    dense = randn(3, 70, 90).to(dtype)
    B, A = factors(3, 70, 90, 40, factor_dtype)
    scalings = torch.tensor([0.5, 1.5, 0.3], dtype=torch.float64)
    together = stored(dense.unbind(), "row")
    bodies.subtract_lowrank_(Weights.of(together), B, A, scalings)
    for index in range(3):
        for layout in ("row", "unaligned"):
            alone = stored([dense[index]], layout)
            part = slice(index, index + 1)
            bodies.subtract_lowrank_(Weights.of(alone), B[part], A[part], scalings[part])
            assert torch.equal(alone[0], together[index])


def test_views_are_subtracted_from_in_place(bodies: Any) -> None:
    dense = randn(2, 40, 30).bfloat16()
    B, A = factors(2, 30, 40, 5, torch.bfloat16)
    scalings = torch.ones(2, dtype=torch.float64)
    weights = stored(dense.unbind(), "row")
    bodies.subtract_lowrank_(Weights.of(weights).mT, B, A, scalings)  # a Conv1D's (in, out)
    exact = dense.double() - (B.double() @ A.double()).mT
    assert (torch.stack(weights).double() - exact).norm() <= 2.0**-9 * exact.norm()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e20])
def test_extreme_factors(size: float, bodies: Any) -> None:
    dense = randn(2, 40, 30).bfloat16()
    B, A = (size * factor for factor in factors(2, 40, 30, 5, torch.float32))
    weights, expected = stored(dense.unbind(), "row"), stored(dense.unbind(), "row")
    ones = torch.ones(2, dtype=torch.float64)
    bodies.subtract_lowrank_(Weights.of(weights), B.bfloat16(), A.bfloat16(), ones)
    batched_reference.subtract_lowrank_(Weights.of(expected), B.bfloat16(), A.bfloat16(), ones)
    assert torch.equal(torch.stack(weights).isfinite(), torch.stack(expected).isfinite())
    if size < 1:
        assert torch.equal(torch.stack(weights), dense)


def test_nothing_to_subtract(bodies: Any) -> None:
    weights = Weights.of(stored([randn(4, 3)], "row"))
    before = weights.tensors[0].clone()
    bodies.subtract_lowrank_(weights, randn(1, 4, 0), randn(1, 0, 3), torch.ones(1, dtype=torch.float64))
    assert torch.equal(weights.tensors[0], before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_squares_of_a_batch(dtype: torch.dtype, layout: str, bodies: Any) -> None:
    for m, n in ((1, 1), (530, 20) if layout == "column" else (20, 530), (30, 33)):
        dense = randn(3, m, n).to(dtype)
        got = bodies.sum_of_squares(Weights.of(stored(dense.unbind(), layout)))
        exact = dense.double().square().sum((1, 2))
        assert got.dtype == torch.float64
        assert ((got - exact).abs() <= 1e-6 * exact).all(), (m, n)
        for index in range(3):
            alone = Weights.of(stored([dense[index]], layout))
            assert torch.equal(bodies.sum_of_squares(alone)[0], got[index]), (m, n)


def test_a_weight_has_the_same_sum_beside_unaligned_ones(bodies: Any) -> None:
    dense = randn(2, 20, 600).bfloat16()
    aligned, unaligned = stored([dense[0]], "row")[0], stored([dense[1]], "unaligned")[0]
    alone = bodies.sum_of_squares(Weights.of([aligned]))
    assert torch.equal(bodies.sum_of_squares(Weights.of([unaligned, aligned]))[1:], alone)


def test_sums_of_squares_of_extremes(bodies: Any) -> None:
    values = torch.stack([torch.zeros(20, 30), 1e15 * randn(20, 30), 1e-15 * randn(20, 30), randn(20, 30)])
    broken = values.clone()
    broken[0, 19, 29], broken[1, 0, 0], broken[2, 3, 4] = torch.nan, torch.inf, -torch.inf
    exact = values.double().square().sum((1, 2))
    for dtype in (torch.float32, torch.bfloat16):
        got = bodies.sum_of_squares(Weights.of(values.to(dtype).unbind()))
        assert ((got - exact).abs() <= 4 * ROUNDOFF[dtype] * exact).all()
        got = bodies.sum_of_squares(Weights.of(broken.to(dtype).unbind()))
        assert got[0].isnan()
        assert got[1:3].isinf().all()
        assert got[3].isfinite()
    assert bodies.sum_of_squares(Weights.of([randn(0, 4), randn(0, 4)])).tolist() == [0.0, 0.0]
