"""The cost model chooses what is measured to be fast, and nothing that does not fit."""

from __future__ import annotations

import pytest

from pissa_kernels import cost


@pytest.mark.parametrize(
    ("m", "n", "rank", "niter", "method"),
    [
        (4096, 4096, 16, None, "krylov"),
        (4096, 4096, 3000, None, "svd"),
        (4096, 4096, 1500, None, "gram"),
        (64, 64, 8, None, "gram"),
        (64, 64, 64, None, "svd"),
        (1, 1, 1, None, "svd"),
        (128256, 4096, 16, 4, "krylov"),
    ],
)
def test_cost_model(m: int, n: int, rank: int, niter: int | None, method: str) -> None:
    assert cost.plan(m, n, rank, niter).method == method
