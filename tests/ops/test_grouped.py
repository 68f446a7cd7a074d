"""Products of groups of weights of different shapes, in one launch, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pissa_kernels as pk

from ..support.backends import DTYPES, product_error, randn

pytestmark = pytest.mark.usefixtures("poison")


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
            own = product_error(A.float(), P, exact) + exact.norm() * 2.0**-24
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
