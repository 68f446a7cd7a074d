"""Products of weights of different shapes, in one launch, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa_kernels.ops import reference

from ..support.backends import DTYPES, product_error, randn

launch = pytest.importorskip("pissa_kernels.ops.triton.grouped").grouped
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("verb", ["matmul", "rmatmul"])
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_grouped_products_of_any_shapes(dtype: torch.dtype, verb: str, name: str) -> None:
    grouped = launch if name == "triton" else reference.grouped
    shapes = [(64, 48), (1, 17), (130, 63), (16, 16), (1, 16), (16, 1), (0, 5)]
    for kind in ("row", "column", "mixed"):
        weights, panels = [], []
        for seed, shape in enumerate(shapes):
            W = randn(*shape, seed=seed).to(dtype)
            transposed = kind == "column" or (kind == "mixed" and seed % 2)
            weights.append(W.mT.contiguous().mT if transposed else W)
            panels.append(randn(shape[1 if verb == "matmul" else 0], 16, seed=seed + 50))
        for W, P, got in zip(weights, panels, grouped(verb, weights, panels), strict=True):
            A = W if verb == "matmul" else W.mT
            exact = A.double() @ P.double()
            torchs = product_error(A.float(), P, exact) + exact.norm() * 2.0**-24
            assert got.shape == exact.shape
            assert (got - exact).norm() <= 1.1 * torchs, (kind, W.shape)
    assert grouped(verb, [], []) == []


@pytest.mark.parametrize(
    ("weights", "panels", "error", "words"),
    [
        ([torch.ones(3, 2)], [], ValueError, "1 weights and 0 panels"),
        ([torch.ones(3, 2)], [torch.ones(3, 2)], ValueError, r"takes a panel \(2, k\)"),
        ([torch.ones(3, 2), torch.ones(3, 2).half()], [torch.ones(2, 4)] * 2, ValueError, "weight 1 is torch.float16"),
        ([torch.ones(3, 2)] * 2, [torch.ones(2, 4), torch.ones(2, 5)], ValueError, "panel of 5 columns; the first is"),
        ([torch.ones(3, 2)], [torch.ones(2, 4).double()], TypeError, "panels must be float32, got torch.float64"),
    ],
)
def test_groups_that_do_not_match_are_refused(
    weights: list[Tensor], panels: list[Tensor], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        launch("matmul", weights, panels)


def test_pieces_of_groups_are_one_two_or_three() -> None:
    with pytest.raises(ValueError, match="pieces must be 1, 2 or 3, got 4"):
        launch("matmul", [torch.ones(3, 2)], [torch.ones(2, 4)], pieces=4)
