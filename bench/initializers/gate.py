"""The gate of the initializers: accuracy of one adapter and residual, and the limits it has to meet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_kernels import Certificate

from ..harness.dtypes import UNIT_ROUNDOFF
from ..harness.gate import BASELINE_LIMIT, PISSA_LIMIT, ROUNDING, Reference, above, rounding_error, subspace_deficit
from .providers import SCALING, Outcome, Provider

# Allowance for round-off in a comparison with PEFT's figure or with the optimum.
SLACK = 1e-9


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one outcome. Energies are relative to the optimum Σ_{i≤r}σᵢ².

    All but the first are None for a provider that makes no adapter.

    Attributes:
        energy_deficit: 1 − ‖W·V̂‖_F²/optimum of the computed vectors: for ours, those of ``truncated_svd`` with the
            same arguments, because the stored A is rounded; for PEFT, its float32 A.
        adapter_deficit: the same for the rows of A as stored, rounded to the weight's dtype.
        residual_deficit: 1 − (‖W‖_F² − ‖W − s·B·A‖_F²)/optimum of A and B as stored; a wrong B increases it.
        reconstruction: ‖W − (W_res + s·B·A)‖_F/‖W‖_F with A and B as stored.
        rounding: :func:`bench.harness.gate.rounding_error`; at most 1 if the residual was rounded once.
        certificate: certificate of ``truncated_svd``; None for others.
    """

    energy_deficit: float
    adapter_deficit: float | None = None
    residual_deficit: float | None = None
    reconstruction: float | None = None
    rounding: float | None = None
    certificate: Certificate | None = None


def measure(provider: Provider, outcome: Outcome, weight: Tensor, rank: int, truth: Reference) -> Accuracy:
    """The accuracy of one outcome on ``weight`` (out, in)."""
    optimum = truth.optimum(rank)
    right, certificate = provider.triplets(weight, rank) or (outcome.right, None)
    energy_deficit = subspace_deficit(truth.weight, right, optimum)
    if outcome.lora_A is None or outcome.lora_B is None or outcome.residual is None:
        return Accuracy(energy_deficit, certificate=certificate)
    lora_A, lora_B, residual = outcome.lora_A.double(), outcome.lora_B.double(), outcome.residual.double()
    remainder = truth.weight - SCALING * (lora_B @ lora_A)
    total = float(truth.weight.square().sum())
    error = remainder - residual
    return Accuracy(
        energy_deficit=energy_deficit,
        adapter_deficit=subspace_deficit(truth.weight, outcome.lora_A, optimum),
        residual_deficit=1 - (total - float(remainder.square().sum())) / optimum,
        reconstruction=float(error.square().sum().sqrt()) / math.sqrt(total),
        rounding=rounding_error(truth.weight, outcome.residual, lora_B, lora_A, SCALING),
        certificate=certificate,
    )


def rejection(provider: Provider, accuracy: Accuracy, dtype: torch.dtype, baseline: Accuracy | None) -> str | None:
    """Why a provider may not be timed, or None.

    Args:
        provider: provider that was measured.
        accuracy: its accuracy.
        dtype: dtype of the weight.
        baseline: accuracy of PEFT's "pissa_niter_N" with the same N, or None if it failed; not used for "pissa".
    """
    figures = (accuracy.energy_deficit, accuracy.adapter_deficit, accuracy.residual_deficit, accuracy.reconstruction)
    if not all(math.isfinite(figure) for figure in figures if figure is not None):
        return "a figure is not finite"
    if min(accuracy.energy_deficit, accuracy.adapter_deficit or 0, accuracy.residual_deficit or 0) < -SLACK:
        return "captures more energy than the optimum: the reference is wrong"
    if provider.family != "ours":
        return above("energy deficit", accuracy.energy_deficit, BASELINE_LIMIT)
    if provider.niter is None:
        limit = PISSA_LIMIT
    elif baseline is None:
        return "PEFT failed, so that there is no baseline"
    else:
        limit = max(baseline.energy_deficit, 0.0) + SLACK
    assert accuracy.adapter_deficit is not None
    assert accuracy.residual_deficit is not None
    assert accuracy.rounding is not None
    # each element of A and of B is off by at most u: together an energy of at most (2u)² of the adapter's
    stored = limit + 4 * UNIT_ROUNDOFF[dtype] ** 2
    return (
        above("energy deficit", accuracy.energy_deficit, limit)
        or above("adapter deficit", accuracy.adapter_deficit, stored)
        or above("residual deficit", accuracy.residual_deficit, stored)
        or above(ROUNDING, accuracy.rounding, 1.0)
    )
