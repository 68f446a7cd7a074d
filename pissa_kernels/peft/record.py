"""The record of an initialization, kept with its layer: A₀, B₀, and fingerprints of W and of the residual W_res.

Training moves A and B away from A₀ and B₀, while the weight stays W − s·B₀·A₀. The initial factors are needed to
compute with W again (a reference policy), to take the same residual at a reload, and to convert to a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..numerics import UNIT_ROUNDOFF
from ..report import LayerReport

# Elements in a fingerprint. A residual differs from its weight in nearly all of them.
SAMPLES = 64
_ATTRIBUTE = "pissa_initial"


# Pickled with models: the names of the fields are those of version 0.1.0.
@dataclass(frozen=True, eq=False)
class InitRecord:
    """One initialization of one layer.

    Attributes:
        adapter: name of the adapter.
        lora_A, lora_B: A₀ (r, in) and B₀ (out, r) on the CPU, in the dtype that stores the adapter.
        report: rank, scaling, initializer, seed and certificate.
        before: (≤ SAMPLES,) float32, fingerprint of W.
        after: (≤ SAMPLES,) float32, fingerprint of W_res.
        shared: whether another adapter's record is of the same subtraction.
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
    return torch.take(weight.detach(), places_on(weight)).float().cpu()


def sample_(out: Tensor, weights: Sequence[Tensor], places: Tensor) -> None:
    """The elements of :func:`fingerprint` of weights of one shape. Allocates nothing, and does not wait for a GPU.

    Args:
        out: (batch, k) of the weights' dtype, on their device; overwritten.
        weights: (m, n) each.
        places: result of :func:`places_on`.
    """
    for row, weight in zip(out, weights, strict=True):
        torch.take(weight.detach(), places, out=row)


def places_on(weight: Tensor) -> Tensor:
    """Places (k,) of the elements of a fingerprint in a weight (m, n) read by rows, on its device."""
    places = _places(weight.numel())
    if weight.is_cuda:
        places = places.pin_memory()
    return places.to(weight.device, non_blocking=True)


@lru_cache(maxsize=256)
def _places(elements: int) -> Tensor:
    return torch.linspace(0, elements - 1, min(SAMPLES, elements), dtype=torch.float64, device="cpu").long()


def matches(recorded: Tensor, dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether a weight has a recorded fingerprint: exactly in the same dtype, to the rounding of both in another.

    Args:
        recorded: result of :func:`fingerprint`.
        dtype: dtype of the weight that it was taken from.
        weight: the weight to compare, (m, n).
    """
    found = fingerprint(weight)
    if found.shape != recorded.shape:
        return False
    if weight.dtype == dtype:
        return torch.equal(found, recorded)
    allowed = UNIT_ROUNDOFF[weight.dtype] + UNIT_ROUNDOFF[dtype]
    subnormal = max(torch.finfo(kind).smallest_normal for kind in (weight.dtype, dtype)) * allowed
    return bool(((found - recorded).abs() <= allowed * recorded.abs() + subnormal).all())


def remember(layer: nn.Module, record: InitRecord) -> None:
    """Keep a record as an attribute of its layer: copied and pickled with the layer, but not in its state dict."""
    layer.__dict__.setdefault(_ATTRIBUTE, []).append(record)


def records(layer: nn.Module) -> list[InitRecord]:
    """The records of a layer, oldest first. A subtraction that adapters share has a record for each of them."""
    return list(layer.__dict__.get(_ATTRIBUTE, []))


def of_adapter(layer: nn.Module, adapter: str) -> InitRecord | None:
    """The latest record of one adapter, or None."""
    return next((record for record in reversed(records(layer)) if record.adapter == adapter), None)
