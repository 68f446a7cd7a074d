"""Whether the stored weight of a layer is what its records say: fingerprints of the two, compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...adapter.layouts import Layout, layout_of
from ...checks import layer_context
from ...runtime.shards import is_sharded
from .quantized import is_quantized
from .record import InitRecord, fingerprint, matches, places_of, records
from .state import Factors, label, terms, values


def sampled(weight: Tensor, factors: Factors, layout: Layout) -> Tensor:
    """Elements of B₀·A₀ at the places of the fingerprint of ``weight``: float64 on the CPU."""
    A, B = layout.split(*(factor.double() for factor in factors))
    places = places_of(weight.shape)
    columns = A.shape[2] if not layout.transposed else B.shape[1]
    rows = B.shape[1] if not layout.transposed else A.shape[2]
    part, row, column = places // (rows * columns), places // columns % rows, places % columns
    out, into = (column, row) if layout.transposed else (row, column)
    return (B[part, out] * A.mT[part, into]).sum(dim=1)


def original_fingerprint(layer: Any) -> Tensor:
    """Fingerprint of W of an unmerged layer, from the stored weight and the records; float64."""
    weight, found = values(layer), terms(layer)
    total = fingerprint(weight).double()
    for factors, subtracted in zip(found.factors, found.subtracted, strict=True):
        if subtracted:
            total = total + subtracted * sampled(weight, factors, layout_of(layer))
    return total


def can_be_compared(layer: Any) -> bool:
    """Whether the stored weight can be held against a fingerprint: not merged, partitioned or on meta."""
    layout = layout_of(layer)
    weight = layout.weight
    if is_quantized(layout.module):
        return not layer.merged and not weight.is_meta
    plain = (
        (type(weight.data) is Tensor or is_sharded(weight))
        and weight.ndim >= 2
        and not weight.is_meta
        and weight.numel() > 0
    )
    return plain and not layer.merged


def is_known(layer: Any) -> bool:
    """Whether the stored weight is what the records say, as far as it can be compared."""
    kept = records(layer)
    if not kept or not can_be_compared(layer):
        return True
    return is_original(layer, kept[0])


def is_original(layer: Any, record: InitRecord) -> bool:
    """Whether W of an unmerged layer is the weight that a record was taken from."""
    layout = layout_of(layer)
    # bitsandbytes rounds the scales of quantized weights to bfloat16 on some CPUs
    dtypes = (record.report.dtype, torch.bfloat16 if is_quantized(layout.module) else layout.weight.dtype)
    return matches(record.before, original_fingerprint(layer), dtypes, other=record.after)


def check_known(layer: Any) -> None:
    """Refuse a stored weight that is not what the records say.

    Raises:
        ValueError: with the name of the layer.
    """
    if not is_known(layer):
        with layer_context(label(layer)):
            raise ValueError(
                "the stored weight is no longer the one that PiSSA left here, so the original weight is not known. "
                "Load the model again under patch_peft()"
            )
