"""The record of an initialization, kept with its layer: A₀, B₀, and fingerprints of W and of the residual W_res.

Training moves A and B away from A₀ and B₀, while the weight stays W − s·B₀·A₀. The initial factors are needed to
compute with W again (a reference policy), to take the same residual at a reload, and to convert to a plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from ...numerics import UNIT_ROUNDOFF
from ...report import LayerReport
from ...runtime.shards import is_sharded, taken

# Elements in a fingerprint of a matrix, and of a weight with more than two dimensions, such as a stack of matrices. A
# residual differs from its weight in nearly all of them.
SAMPLES, SAMPLES_OF_STACK = 64, 1024
# Distance, in units of u·rms(W), within which two fingerprints are of the same weight. A rounding to nearest moves a
# weight by about 0.4 of this unit, and n of them by √n·0.4, so some hundred merges stay below.
ROUNDINGS = 8
# Name in a record whose adapter is gone. No adapter can have it: torch's ModuleDict takes no name with a dot.
GONE = "."
_ATTRIBUTE = "pissa_initial"


# Pickled with models: the names of the fields are those of version 0.1.0.
@dataclass(frozen=True, eq=False)
class InitRecord:
    """One initialization of one layer.

    Attributes:
        adapter: name of the adapter.
        lora_A, lora_B: A₀ and B₀ on the CPU, in the shapes and the dtype in which PEFT stores the adapter; (r, in) and
            (out, r) for a linear layer.
        report: rank, scaling, initializer, seed and certificate.
        before: (k,) float32, fingerprint of W.
        after: (k,) float32, fingerprint of W_res.
        shared: False if s·B₀·A₀ of this record is subtracted from the stored weight. True if it is not, because
            another record is: one with the same factors, or one with other factors.
    """

    adapter: str
    lora_A: Tensor
    lora_B: Tensor
    report: LayerReport
    before: Tensor
    after: Tensor
    shared: bool = False


def fingerprint(weight: Tensor) -> Tensor:
    """Evenly spread elements of a weight, the same ones for all strides and devices: (k,) float32 on the CPU.

    All processes that have a part of a ``DTensor`` call this together.
    """
    if is_sharded(weight):
        return taken(weight, places_of(weight.shape))
    return torch.take(weight.detach(), places_on(weight)).float().cpu()


def sample_(out: Tensor, weights: Sequence[Tensor], places: Tensor) -> None:
    """The elements of :func:`fingerprint` of weights of one shape. Allocates nothing, and does not wait for a GPU.

    Args:
        out: (batch, k) of the weights' dtype, on their device; overwritten.
        weights: the weights.
        places: result of :func:`places_on`.
    """
    for row, weight in zip(out, weights, strict=True):
        torch.take(weight.detach(), places, out=row)


def places_on(weight: Tensor) -> Tensor:
    """Places (k,) of the elements of a fingerprint in a weight that is read by rows, on its device."""
    places = places_of(weight.shape)
    if weight.is_cuda:
        places = places.pin_memory()
    return places.to(weight.device, non_blocking=True)


def places_of(shape: Sequence[int]) -> Tensor:
    """The same for a weight of a shape, on the CPU."""
    return _places(math.prod(shape), SAMPLES if len(shape) == 2 else SAMPLES_OF_STACK)


@lru_cache(maxsize=256)
def _places(elements: int, samples: int) -> Tensor:
    return torch.linspace(0, elements - 1, min(samples, elements), dtype=torch.float64, device="cpu").long()


def matches(
    recorded: Tensor,
    found: Tensor,
    dtypes: Sequence[torch.dtype],
    *,
    other: Tensor | None = None,
    roundings: float = ROUNDINGS,
) -> bool:
    """Whether two fingerprints are of the same weight, up to the rounding that merging and casting leave.

    Args:
        recorded, found: results of :func:`fingerprint`.
        dtypes: dtypes that the two weights are or were stored in; the coarsest decides.
        other: fingerprint of a weight that must not be taken for the recorded one, such as its residual. Half of the
            distance to it is allowed at most, but one rounding always.
        roundings: distance allowed, in units of u·rms(W).
    """
    if found.shape != recorded.shape:
        return False
    u = max(UNIT_ROUNDOFF.get(dtype, 2.0**-53) for dtype in dtypes)
    subnormal = u * max(torch.finfo(dtype).smallest_normal for dtype in dtypes)
    unit = u * _rms(recorded)
    allowed = roundings * unit
    if other is not None:
        allowed = max(unit, min(allowed, _rms(other.double() - recorded.double()) / 2))
    return _rms(found.double() - recorded.double()) <= allowed + subnormal


def check_given(given: InitRecord, found: Tensor, dtype: torch.dtype) -> None:
    """Refuse initial factors that were not taken from a weight.

    Args:
        given: the record of the factors, from a file.
        found: fingerprint of the weight.
        dtype: of the weight.

    Raises:
        ValueError: with what to load instead.
    """
    if matches(given.before, found, (given.report.dtype, dtype), other=given.after):
        return
    if (quantized := given.report.quantization) is not None:
        raise ValueError(
            f"the adapter was trained on a quantized residual ({quantized.scheme}), and this weight is not quantized. "
            "Load the base model quantized as for the training, or convert the adapter to a plain LoRA "
            "(convert_adapter)"
        )
    raise ValueError(
        "the weight is not the one that the adapter's initial factors were taken from. Load the base model that the "
        "adapter was trained on, neither its residual nor another model."
    )


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def remember(layer: nn.Module, record: InitRecord) -> None:
    """Keep a record as an attribute of its layer: copied and pickled with the layer, but not in its state dict.

    A previous record of the same adapter ends: it is dropped, or loses its name if it is of the subtraction.
    """
    kept = forgotten(records(layer), record.adapter)
    set_records(layer, [*kept, sharing(record, kept)])


def sharing(record: InitRecord, kept: Sequence[InitRecord]) -> InitRecord:
    """A record with the tensors of the first one that has the same factors: by them, adapters that share are found."""
    same = next((other for other in kept if same_factors(other, record)), record)
    return replace(record, lora_A=same.lora_A, lora_B=same.lora_B)


def set_records(layer: nn.Module, kept: Sequence[InitRecord], parameter: str = "weight") -> None:
    """Replace all records of a layer; without any, it has no trace of them.

    Args:
        layer: a LoRA layer, or a bare module.
        kept: the records.
        parameter: name of the bare module's parameter that they are of.
    """
    if kept:
        layer.__dict__[_attribute(parameter)] = list(kept)
    else:
        layer.__dict__.pop(_attribute(parameter), None)


def _attribute(parameter: str) -> str:
    return _ATTRIBUTE if parameter == "weight" else f"{_ATTRIBUTE}_{parameter}"


def forgotten(kept: Sequence[InitRecord], adapter: str) -> list[InitRecord]:
    """Records without those of one adapter. A subtraction stays, under a name that no adapter can have."""
    others = (replace(record, adapter=GONE) if record.adapter == adapter else record for record in kept)
    return [record for record in others if record.adapter != GONE or not record.shared]


def same_factors(one: InitRecord, other: InitRecord) -> bool:
    """Whether two records have the same A₀ and B₀, bit for bit."""
    pairs = ((one.lora_A, other.lora_A), (one.lora_B, other.lora_B))
    return all(left.dtype == right.dtype and torch.equal(left, right) for left, right in pairs)


def records(layer: nn.Module, parameter: str = "weight") -> list[InitRecord]:
    """The records of a layer, oldest first. A subtraction that adapters share has a record for each of them.

    Args:
        layer: a LoRA layer, or a bare module.
        parameter: name of the bare module's parameter that they are of.
    """
    return list(layer.__dict__.get(_attribute(parameter), []))


def of_adapter(layer: nn.Module, adapter: str) -> InitRecord | None:
    """The latest record of one adapter, or None."""
    return next((record for record in reversed(records(layer)) if record.adapter == adapter), None)
