"""Merging adapters into the weight of a layer with initial factors, and back.

While adapters are merged, exactly their initial factors are subtracted, so that the weight is W + Σ_merged ΔW_j.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...adapter.attention import is_projection
from ...adapter.layouts import layout_of
from ...runtime.shards import is_sharded, put_
from ..saving.pieces import check_gathered
from ..weights import known, state
from ..weights.quantized import copied, is_quantized, put, scheme_of
from ..weights.tensor_parallel import plan_of

_MERGED = "pissa_merged"
# The packed weight before the merge.
_BEFORE = "pissa_packed"
# Relative difference of scalings that are equal: PEFT multiplies and divides them, or makes float32 tensors of them.
SCALING_TOLERANCE = 1e-6


def inside(base: nn.Module) -> list[Any]:
    """The LoRA layer inside of an attention, which PEFT merges and unloads with it."""
    return [base.out_proj] if isinstance(base, nn.MultiheadAttention) else []


def merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """``LoraLayer.merge``: subtract exactly what the merged adapters start from, then let PEFT merge."""
    method = type(layer).merge
    names = layer.active_adapters if adapter_names is None else adapter_names
    merged = list(layer.merged_adapters)
    layout = layout_of(layer)
    new = [] if isinstance(names, str) else [name for name in names if name in layout.adapters and name not in merged]
    if not new:
        method(layer, safe_merge=safe_merge, adapter_names=adapter_names)
        return
    check_safe(layer, safe_merge)
    if not is_projection(layer):  # PEFT has changed the weight already where the attention merges it
        check_merge(layer, new)
    for each in inside(layout.module):
        check_merge(each, new)
    if is_quantized(layout.module):
        with _as_merged(layer, merged):
            _merge_quantized(layer, new, safe_merge)
        _keep_scalings(layer, merged, new)
        return
    change = _change(layer, merged, [*merged, *new])
    weight = layout.weight
    backup = weight.data.clone(memory_format=torch.preserve_format) if safe_merge or any(change) else None
    try:
        state.add_(weight.data, state.terms(layer).factors, change, layout)
        with _as_merged(layer, merged):
            method(layer, safe_merge=safe_merge, adapter_names=adapter_names)
    except BaseException:
        if backup is not None:
            layer.merged_adapters[:] = merged
            put_(weight, backup.to_local() if is_sharded(weight) else backup)
        raise
    _keep_scalings(layer, merged, new)


def _keep_scalings(layer: Any, merged: Sequence[str], new: Sequence[str]) -> None:
    """Remember with which scalings adapters are merged: those that were before, and the new ones."""
    earlier = {name: scaling for name, scaling in layer.__dict__.get(_MERGED, {}).items() if name in merged}
    layer.__dict__[_MERGED] = earlier | {name: float(layer.scaling[name]) for name in new}


def unmerge(layer: Any) -> None:
    """``LoraLayer.unmerge``: with the scalings of the merge; then subtract what was subtracted before it."""
    layout = layout_of(layer)
    merged = [name for name in layer.merged_adapters if name in layout.adapters]
    if merged:
        check_gathered(layer, "unmerge from the weight")
    if _BEFORE in layer.__dict__:
        put(layer.get_base_layer(), layer.__dict__.pop(_BEFORE))
        layer.__dict__.pop(_MERGED, None)
        layer.merged_adapters.clear()
        return
    with _as_merged(layer, merged):
        type(layer).unmerge(layer)
    layer.__dict__.pop(_MERGED, None)
    found = state.terms(layer)
    change = _change(layer, merged, ())
    state.add_(layout.weight.data, found.factors, change, layout)


def _merge_quantized(layer: Any, new: Sequence[str], safe_merge: bool) -> None:
    """Quantize W + Σ ΔW_j of all merged adapters. The codes before it are kept for :func:`unmerge`.

    PEFT adds one adapter after another to the dequantized weight, and quantizes each sum.
    """
    base = layer.get_base_layer()
    before = layer.__dict__.get(_BEFORE) or copied(base)
    merged = [*layer.merged_adapters, *new]
    found = state.terms(layer)
    change = [then - now for then, now in zip(found.subtracted, _subtracted(found, merged), strict=True)]
    total = before.dequantize()
    dtype = total.dtype
    total = total.float()
    state.add_(total, found.factors, change, layout_of(layer))
    for name in merged:
        total += layer.get_delta_weight(name).to(total.device, torch.float32)
    if safe_merge and not bool(total.isfinite().all()):
        raise ValueError(f"{state.label(layer)}: NaN or Inf in the merged weight; an adapter of {merged} is broken")
    scheme = scheme_of(base)
    assert scheme is not None
    put(base, scheme.quantize(total, dtype))
    layer.__dict__[_BEFORE] = before
    layer.merged_adapters[:] = merged


@contextlib.contextmanager
def _as_merged(layer: Any, merged: Sequence[str]) -> Iterator[None]:
    """Context in which the merged adapters have the scalings of their merge, and PEFT's own methods take them out.

    For the norms of a variant, PEFT takes them out and merges them again. What is subtracted stays as it is then.
    """
    guards = {name: layer.__dict__.pop(name) for name in ("merge", "unmerge") if name in layer.__dict__}
    now = {name: layer.scaling[name] for name in merged if name in layer.scaling}
    then = layer.__dict__.get(_MERGED, {})
    layer.scaling.update({name: then[name] for name in now if name in then})
    try:
        yield
    finally:
        layer.scaling.update(now)
        layer.__dict__.update(guards)


def check_merge(layer: Any, names: Sequence[str]) -> None:
    """Refuse a merge after which the layer would compute something else.

    Args:
        layer: a layer with records.
        names: adapters of the layer that are to be merged and are not.

    Raises:
        ValueError: with the name of the layer.
    """
    check_gathered(layer, "merge into the weight")
    known.check_known(layer)
    _check_whole(layer, names)
    found = state.terms(layer)
    for name in names:
        recorded = found.scalings.get(name)
        if recorded is None:
            continue
        scaling = float(layout_of(layer).scalings[name])
        if abs(scaling - recorded) > SCALING_TOLERANCE * recorded:
            raise ValueError(
                f"{state.label(layer)}: the adapter {name!r} has the scaling {scaling:g}, but its initial factors were "
                f"taken with {recorded:g}. Set it back before the merge (set_scale({name!r}, 1) on each layer)"
            )
    merged = [*layer.merged_adapters, *names]
    if is_quantized(layout_of(layer).module):
        special = [name for name in merged if name in layer.lora_variant or layer.lora_bias.get(name)]
        if special:
            raise ValueError(
                f"{state.label(layer)}: the adapter {special[0]!r} is more than a product B·A, and is not merged into "
                "a quantized weight here. Keep it unmerged"
            )
    subtracted = _subtracted(found, merged)
    variants = [name for name in merged if name in layer.lora_variant and not found.is_own(name, subtracted)]
    if variants:
        raise ValueError(
            f"{state.label(layer)}: the adapter {variants[0]!r} ({state.variant_name(layer, variants[0])}) computes "
            f"with the stored weight and cannot be merged here with {', '.join(map(repr, merged))}. Merge it alone, in "
            "a model of its own"
        )


def check_safe(layer: Any, safe_merge: bool) -> None:
    """Refuse ``safe_merge`` of a sharded weight: PEFT puts a tensor in its place, which a ``DTensor`` does not take.

    Raises:
        ValueError: with the name of the layer.
    """
    if safe_merge and is_sharded(layout_of(layer).weight):
        raise ValueError(
            f"{state.label(layer)}: safe_merge=True has no effect on a sharded weight. Merge without it, or where the "
            "model is whole"
        )


def _check_whole(layer: Any, names: Sequence[str]) -> None:
    """Refuse a sharded weight, unless FSDP2 has sharded A and B like it: PEFT's own merge is of their parts then."""
    layout = layout_of(layer)
    factors = [factor for name in names for factor in layout.factors(name)]
    if is_sharded(layout.weight) and not (plan_of(layer) is None and all(map(is_sharded, factors))):
        raise ValueError(
            f"{state.label(layer)}: the weight is sharded, and PEFT merges into a whole one. Save the adapter, and "
            "merge it where the model is whole (merge_and_unload) or on disk (pissa-kernels merge)"
        )


def _change(layer: Any, before: Sequence[str], after: Sequence[str]) -> list[float]:
    """What to add to the stored weight, in each group, between two sets of merged adapters."""
    found = state.terms(layer)
    return [then - now for then, now in zip(_subtracted(found, before), _subtracted(found, after), strict=True)]


def _subtracted(found: state.Terms, merged: Sequence[str]) -> list[float]:
    """What is subtracted in each group while some adapters are merged; as recorded while none is."""
    if not merged:
        return found.subtracted
    totals = [0.0] * len(found.factors)
    for name in merged:
        if name in found.groups:
            totals[found.groups[name]] += found.scalings[name]
    return totals
