"""The accuracy gate: nothing is timed that is not right.

Everything here is float64 and uses no code of the package it judges. A provider that fails gets a reason instead of
times.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pissa_kernels import Certificate

from .providers import SCALING, Outcome, Provider

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "bench"
# Ten times the tolerance that "pissa" works to.
PISSA_LIMIT = 1e-5
# What a promise relative to PEFT may miss by, and how far a figure may exceed what is possible.
SLACK = 1e-9
BASELINE_LIMIT = 0.5
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SMALLEST_SUBNORMAL = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}


@dataclass(frozen=True, eq=False)
class Reference:
    """What is true of one weight.

    Attributes:
        weight: (out, in) float64.
        squares: (min(out, in),) float64, σᵢ² in descending order.
    """

    weight: Tensor
    squares: Tensor

    def optimum(self, rank: int) -> float:
        """Σ_{i≤r} σᵢ²."""
        return float(self.squares[:rank].sum())


@dataclass(frozen=True)
class Accuracy:
    """How good one outcome is; energies relative to the optimum Σ_{i≤r}σᵢ², None where the provider makes no adapter.

    Attributes:
        energy_deficit: 1 − ‖W·V̂‖_F²/optimum of the computed vectors: ours of ``truncated_svd`` with the same
            arguments, because our A is already rounded; PEFT's of the float32 A it sets.
        adapter_deficit: the same of the rows of A as stored, rounded to the weight's dtype.
        residual_deficit: 1 − (‖W‖_F² − ‖W − s·B·A‖_F²)/optimum of A and B as stored: also shows a wrong B.
        reconstruction: ‖W − (W_res + s·B·A)‖_F/‖W‖_F with A and B as stored.
        rounding: max of |W − W_res − s·B·A| over what one rounding of the residual explains, elementwise.
        certificate: ours.
    """

    energy_deficit: float
    adapter_deficit: float | None = None
    residual_deficit: float | None = None
    reconstruction: float | None = None
    rounding: float | None = None
    certificate: Certificate | None = None


def reference(weight: Tensor) -> Reference:
    """The float64 spectrum of a weight (out, in), from the Gram matrix on its smaller side.

    Cached in :data:`CACHE` under a hash of the values themselves, so no change of a case or a generator leaves a stale
    entry behind.
    """
    exact = weight.detach().double()
    content = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(content.shape)} {content.dtype}".encode())
    digest.update(content.view(torch.uint8).numpy().data)
    path = CACHE / f"{digest.hexdigest()[:32]}.npy"
    if path.exists():
        squares = torch.from_numpy(np.load(path))
    else:
        gram = exact @ exact.mT if exact.shape[0] < exact.shape[1] else exact.mT @ exact
        squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cpu()
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.save(file, squares.numpy())
        unfinished.replace(path)
    return Reference(exact, squares.to(weight.device))


def measure(provider: Provider, outcome: Outcome, weight: Tensor, rank: int, truth: Reference) -> Accuracy:
    """The figures of one outcome on ``weight`` (out, in)."""
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


def rounding_error(weight: Tensor, residual: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float) -> float:
    """max |W − W_res − s·B·A| over what the one rounding of the residual to its dtype explains; W in float64.

    Besides it rank + 1 float32 operations come before it for each element.
    """
    B, A, stored = lora_B.double(), lora_A.double(), residual.double()
    allowed = UNIT_ROUNDOFF[residual.dtype] * stored.abs() + SMALLEST_SUBNORMAL[residual.dtype]
    magnitude = weight.abs() + scaling * (B.abs() @ A.abs())
    allowed += (len(A) + 3) * UNIT_ROUNDOFF[torch.float32] * magnitude
    return float(((weight - stored - scaling * (B @ A)).abs() / allowed).amax())


def subspace_deficit(weight: Tensor, rows: Tensor, optimum: float) -> float:
    """1 − ‖W·V̂‖_F²/optimum, V̂ an orthonormal basis of the span of ``rows`` (r, in); ``weight`` in float64."""
    basis, _ = torch.linalg.qr(rows.double().mT)
    return 1 - float((weight @ basis).square().sum()) / optimum


def refusal(provider: Provider, accuracy: Accuracy, dtype: torch.dtype, baseline: Accuracy | None) -> str | None:
    """Why ``provider`` may not be timed, or None.

    Args:
        provider: whose figures they are.
        accuracy: the figures.
        dtype: of the weight.
        baseline: PEFT's figures for the same "pissa_niter_N"; not read for "pissa".
    """
    figures = (accuracy.energy_deficit, accuracy.adapter_deficit, accuracy.residual_deficit, accuracy.reconstruction)
    if not all(math.isfinite(figure) for figure in figures if figure is not None):
        return "a figure is not finite"
    if min(accuracy.energy_deficit, accuracy.adapter_deficit or 0, accuracy.residual_deficit or 0) < -SLACK:
        return "captures more than the optimum: the reference is wrong"
    if provider.family != "ours":
        return _above("energy deficit", accuracy.energy_deficit, BASELINE_LIMIT)
    if provider.niter is None:
        limit = PISSA_LIMIT
    elif baseline is None:
        return "PEFT failed, so there is nothing to hold this against"
    else:
        limit = max(baseline.energy_deficit, 0.0) + SLACK
    assert accuracy.adapter_deficit is not None
    assert accuracy.residual_deficit is not None
    assert accuracy.rounding is not None
    # A and B are each off by at most u, elementwise: an energy of at most (2u)² of what they hold
    stored = limit + 4 * UNIT_ROUNDOFF[dtype] ** 2
    return (
        _above("energy deficit", accuracy.energy_deficit, limit)
        or _above("adapter deficit", accuracy.adapter_deficit, stored)
        or _above("residual deficit", accuracy.residual_deficit, stored)
        or _above("reconstruction error, in units of the allowed rounding,", accuracy.rounding, 1.0)
    )


def _above(what: str, figure: float, limit: float) -> str | None:
    return f"{what} {figure:.1e} is above {limit:.1e}" if not figure <= limit else None
