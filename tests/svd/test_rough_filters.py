"""Chebyshev filters whose products round the panels to bfloat16 pieces, as tensor cores and AMX do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.ops.panels import recurrence
from pissa_kernels.svd import cost
from pissa_kernels.svd import driver as svd
from pissa_kernels.svd.weight_operator import WeightOperator

from ..support.reference import energy_deficit, realistic, with_spectrum

INDEX = torch.arange(1, 301, dtype=torch.float64)
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "realistic": lambda: realistic(400, 300),
    "wide": lambda: realistic(300, 500, seed=1),
    "power 0.3": lambda: with_spectrum(400, 300, INDEX**-0.3),
    "power 0.5": lambda: with_spectrum(400, 300, INDEX**-0.5),
    "geometric": lambda: with_spectrum(400, 300, 0.97**INDEX),
    "spikes and a bulk": lambda: with_spectrum(400, 300, torch.where(INDEX < 30, INDEX**-0.3, 0.3 - INDEX / 2000)),
    "flat": lambda: torch.randn(400, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
}


def rounded(panel: Tensor, pieces: int) -> Tensor:
    """The sum of the first bfloat16 pieces of a panel; three represent float32."""
    kept = torch.zeros_like(panel)
    for _ in range(pieces):
        kept += (panel - kept).bfloat16().float()
    return kept


def rough_filter(self: WeightOperator, X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int) -> Tensor:
    A = self.weight.float()
    return recurrence(lambda P, p: A.mT @ rounded(A @ rounded(P, p), p), X, HX, edge, degree, pieces)


@pytest.mark.parametrize("tol", [2.5e-6, 1e-6, 1e-8])
@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_rounded_filters_meet_the_tolerance_in_as_many_rounds(
    name: str, rank: int, tol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = WEIGHTS[name]().bfloat16()

    def chebyshev(*arguments: object, **_: object) -> cost.SolverPlan:
        plans = cost.candidates(*arguments[:4])  # type: ignore[arg-type]
        return replace(next(plan for plan in plans if plan.method == "chebyshev"), through_gram=False)

    monkeypatch.setattr(svd, "choose_plan", chebyshev)
    monkeypatch.setattr(WeightOperator, "chebyshev", lambda *_: None)  # step by step
    rounds = []
    exact_ritz = WeightOperator.ritz

    def counted(self: WeightOperator, Z: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        rounds[-1] += 1
        return exact_ritz(self, Z, rank)

    monkeypatch.setattr(WeightOperator, "ritz", counted)
    for rough in (False, True):
        if rough:
            monkeypatch.setattr(WeightOperator, "filter", rough_filter)
        rounds.append(0)
        result = pk.truncated_svd(W, rank, tol=tol)
        assert result.certificate.method == "chebyshev"
        assert result.certificate.converged
        assert energy_deficit(W, result.Vh) <= tol
    assert rounds[1] <= rounds[0] + 1
