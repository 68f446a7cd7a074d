"""The accuracy gate: only a correct result is timed.

Everything here is float64 and independent of the code under test.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .dtypes import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF
from .paths import ROOT

CACHE = ROOT / ".cache" / "bench"
# Ten times the tolerance of "pissa".
PISSA_LIMIT = 1e-5
BASELINE_LIMIT = 0.5
ROUNDING = "reconstruction error, in units of the allowed rounding,"


@dataclass(frozen=True, eq=False)
class Reference:
    """The float64 truth about one weight.

    Attributes:
        weight: (out, in) float64.
        squares: (min(out, in),) float64, σᵢ² in descending order.
    """

    weight: Tensor
    squares: Tensor

    def optimum(self, rank: int) -> float:
        """Σ_{i≤r} σᵢ², the most energy that a rank-r approximation captures."""
        return float(self.squares[:rank].sum())


def reference(weight: Tensor) -> Reference:
    """The float64 spectrum of a weight (out, in), from the Gram matrix on its smaller side.

    The spectrum is cached in :data:`CACHE` under a hash of the weight's values, so that no entry can be out of date.
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


def subspace_deficit(weight: Tensor, rows: Tensor, optimum: float) -> float:
    """1 − ‖W·V̂‖_F²/optimum, V̂ an orthonormal basis of the span of ``rows`` (r, in); ``weight`` in float64."""
    basis, _ = torch.linalg.qr(rows.double().mT)
    return 1 - float((weight @ basis).square().sum()) / optimum


def rounding_error(weight: Tensor, residual: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float) -> float:
    """max |W − W_res − s·B·A| / bound, where the bound allows the residual one rounding to its dtype; W in float64.

    The bound also covers the rank + 1 float32 operations that precede this rounding in each element.
    """
    B, A, stored = lora_B.double(), lora_A.double(), residual.double()
    allowed = UNIT_ROUNDOFF[residual.dtype] * stored.abs() + SMALLEST_SUBNORMAL[residual.dtype]
    magnitude = weight.abs() + scaling * (B.abs() @ A.abs())
    allowed += (len(A) + 3) * UNIT_ROUNDOFF[torch.float32] * magnitude
    return float(((weight - stored - scaling * (B @ A)).abs() / allowed).amax())


def layer_rejection(provider: str, deficit: float, rounding: float) -> str | None:
    """Why a provider that has initialized the layers of a model may not be timed, or None.

    Args:
        provider: name of the provider.
        deficit: largest energy deficit of a layer.
        rounding: largest :func:`rounding_error` of a layer; only ours has to stay within the bound.
    """
    if not provider.startswith("ours"):
        return above("energy deficit", deficit, BASELINE_LIMIT)
    return above("energy deficit", deficit, PISSA_LIMIT) or above(ROUNDING, rounding, 1.0)


def above(what: str, figure: float, limit: float) -> str | None:
    """The message that a figure exceeds its limit or is NaN; None if it does not."""
    return f"{what} {figure:.1e} is above {limit:.1e}" if not figure <= limit else None
