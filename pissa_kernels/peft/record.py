"""What was taken out of a weight, kept with its layer: the initial factors A₀ and B₀, and how to recognise W and W_res.

Training moves A and B away from A₀ and B₀, while the weight stays W − s·B₀·A₀. Who wants W's function back (a reference
policy, the same residual at a reload, a plain LoRA) needs the initial ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..numerics import UNIT_ROUNDOFF
from ..report import LayerReport

# Elements by which a weight is recognised. A residual differs from its weight in nearly all of them.
SAMPLES = 64
_ATTRIBUTE = "pissa_initial"


@dataclass(frozen=True, eq=False)
class InitRecord:
    """One initialisation of one layer.

    Attributes:
        adapter: the adapter's name.
        lora_A, lora_B: A₀ (r, in) and B₀ (out, r) on the CPU, in the dtype that stores the adapter.
        report: what was asked, and how it went.
        before: (≤ SAMPLES,) float32, some elements of W.
        after: the same elements of W_res.
        shared: another adapter's record is of the same subtraction.
    """

    adapter: str
    lora_A: Tensor
    lora_B: Tensor
    report: LayerReport
    before: Tensor
    after: Tensor
    shared: bool = False


def fingerprint(weight: Tensor) -> Tensor:
    """Evenly spread elements of a weight (m, n), the same ones for every layout and device: float32 on the CPU."""
    m, n = weight.shape
    index = torch.linspace(0, m * n - 1, min(SAMPLES, m * n), dtype=torch.float64).long().to(weight.device)
    return weight.detach()[index // n, index % n].float().cpu()


def matches(recorded: Tensor, dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether ``weight`` holds the elements that :func:`fingerprint` took from one of ``dtype``.

    Exactly so in the same dtype; else to the rounding of both.
    """
    found = fingerprint(weight)
    if found.shape != recorded.shape:
        return False
    if weight.dtype == dtype:
        return torch.equal(found, recorded)
    allowed = UNIT_ROUNDOFF[weight.dtype] + UNIT_ROUNDOFF[dtype]
    subnormal = max(torch.finfo(kind).smallest_normal for kind in (weight.dtype, dtype)) * allowed
    return bool(((found - recorded).abs() <= allowed * recorded.abs() + subnormal).all())


def remember(layer: nn.Module, initial: InitRecord) -> None:
    """Keep a record with its layer, as an attribute: copied and pickled with the layer, and no part of its state."""
    layer.__dict__.setdefault(_ATTRIBUTE, []).append(initial)


def records(layer: nn.Module) -> list[InitRecord]:
    """What was taken out of this layer's weight so far, the first first; what adapters share is there for each."""
    return list(layer.__dict__.get(_ATTRIBUTE, []))


def of_adapter(layer: nn.Module, adapter: str) -> InitRecord | None:
    """The latest record of one adapter, or None."""
    return next((initial for initial in reversed(records(layer)) if initial.adapter == adapter), None)
