"""LanczosBasis: an orthonormal basis and the projected matrix, also after a restart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.numerics import exact_arithmetic
from pissa_kernels.svd.krylov import LanczosBasis
from pissa_kernels.svd.orthogonalize import orthonormalize
from pissa_kernels.svd.weight_operator import WeightOperator

from ..support.reference import EPS, realistic

BLOCK, LIMIT = 8, 48


def extended(basis: LanczosBasis, panel: Tensor, count: int) -> Tensor:
    """The next panel after ``count`` steps."""
    for _ in range(count):
        basis.append(panel)
        panel, _ = basis.next_panel(panel)
    return panel


def assert_projects(basis: LanczosBasis, H: Tensor) -> None:
    """Q is orthonormal and T = QᵀHQ."""
    Q = basis.rows[: basis.size].mT.double()
    identity = torch.eye(basis.size, dtype=torch.float64)
    assert (Q.mT @ Q - identity).abs().max() <= 20 * EPS
    lower = basis.T[: basis.size, : basis.size].double().tril()
    T = lower + lower.tril(-1).mT
    assert ((T - Q.mT @ H @ Q).abs() <= 100 * EPS * torch.linalg.matrix_norm(H, ord=2)).all()


@pytest.fixture(params=[0, 1])
def weight(request: pytest.FixtureRequest) -> Tensor:
    return realistic(120, 90, seed=request.param).float()


@pytest.mark.parametrize("restarts", [0, 1, 2])
def test_the_projected_matrix_and_the_residuals(weight: Tensor, restarts: int) -> None:
    H = weight.double().mT @ weight.double()
    with exact_arithmetic(weight.device):
        operator = WeightOperator(weight)
        basis = LanczosBasis(operator, BLOCK, LIMIT)
        panel = extended(basis, orthonormalize(operator.sketch(BLOCK, 0))[0], 4)
        assert_projects(basis, H)
        for _ in range(restarts):
            basis.restart(*basis.eigh(), keep=20)
            assert basis.size == 20
            assert_projects(basis, H)
            panel = extended(basis, panel, 3)
            assert_projects(basis, H)
        values, vectors = basis.eigh()
        measured = basis.residuals(vectors[:, -5:])
    V = basis.rows[: basis.size].mT.double() @ vectors[:, -5:].double()
    exact = (H @ V - V * values[-5:].double()).norm(dim=0)
    assert ((measured - exact).abs() <= 1e-3 * exact + 100 * EPS * values[-1]).all()


@pytest.mark.parametrize("restarted", [False, True])
def test_A_times_the_ritz_vectors_is_known_until_the_first_restart(weight: Tensor, restarted: bool) -> None:
    with exact_arithmetic(weight.device):
        operator = WeightOperator(weight)
        basis = LanczosBasis(operator, BLOCK, LIMIT)
        panel = extended(basis, orthonormalize(operator.sketch(BLOCK, 0))[0], 3)
        if restarted:
            basis.restart(*basis.eigh(), keep=20)
        basis.append(panel)
        basis.complete(*operator.compress(panel))
        values, vectors = basis.eigh()
        V, AV, deficit, _ = basis.leading(vectors, 4, basis.unresolved(values, 4))
    if restarted:
        assert AV is None
    else:
        assert AV is not None
        torch.testing.assert_close(AV, weight @ V, rtol=1e-4, atol=1e-4)
    assert deficit(values[-4:].tolist(), [1e-3 * float(values[-1])] * 4) > 0


@pytest.mark.skipif(pk.ops.backend("normal", torch.ones(2, 2)) != "csrc", reason="csrc is not built, or slower here")
@pytest.mark.parametrize("block", [4, 6, 8, 16])
def test_steps_in_one_call_are_those_made_one_by_one(weight: Tensor, block: int) -> None:
    found = []
    with exact_arithmetic(weight.device):
        for one_call in (True, False):
            operator = WeightOperator(weight)
            basis = LanczosBasis(operator, block, 5 * block)
            panel, _ = orthonormalize(operator.sketch(block, 0))
            if one_call:
                panel, deficient = basis.advance(panel, 4)
                assert not deficient
            else:
                panel = extended(basis, panel, 4)
            assert basis.image is not None
            stores = (basis.rows, basis.T.tril(), basis.image)
            written = [store[: basis.size] for store in stores]
            found.append((operator.passes, basis.size, basis.newest, [panel, basis.off_diagonal, *written]))
    assert found[0][:3] == found[1][:3]
    assert_projects(basis, weight.double().mT @ weight.double())
    for one, other in zip(found[0][3], found[1][3], strict=True):
        # the direction of a panel is as sensitive as the Krylov sequence, which doubles errors in each step
        assert ((one - other).norm() / other.norm()).item() <= 1e-4


@pytest.mark.skipif(pk.ops.backend("normal", torch.ones(2, 2)) != "csrc", reason="csrc is not built, or slower here")
@pytest.mark.parametrize("rank", [8, 10])
def test_steps_in_one_call_complete_a_rank_deficient_panel(rank: int) -> None:
    """A matrix of few directions: the basis goes on, orthonormal, with arbitrary ones, and says so."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(90, rank, generator=generator) @ torch.randn(rank, 60, generator=generator)
    with exact_arithmetic(W.device):
        operator = WeightOperator(W)
        basis = LanczosBasis(operator, 4, 40)
        panel, deficient = basis.advance(orthonormalize(operator.sketch(4, 0))[0], 6)
    assert deficient
    assert basis.size == 24
    Q = torch.cat([basis.rows[: basis.size].mT, panel], dim=1).double()
    assert (Q.mT @ Q - torch.eye(28, dtype=torch.float64)).abs().max() <= 20 * EPS
    assert_projects(basis, W.double().mT @ W.double())
