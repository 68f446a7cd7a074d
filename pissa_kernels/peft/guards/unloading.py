"""Taking PEFT's layers out of a model: each bare module gets W, W and the merged changes, or a record's residual."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch

from ...adapter.layouts import adapters_of, layout_of
from ..weights import forward, state
from ..weights.quantized import is_quantized
from ..weights.record import GONE, InitRecord, records, set_records
from .merging import inside

# Adapters of PEFT's recipe, whose residual stays in the weight when a model is unloaded.
_keeping: ContextVar[frozenset[str]] = ContextVar("pissa_kernels_keeping", default=frozenset())


def unload(
    layer: Any, merge: bool = True, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> torch.nn.Module:
    """The bare module for ``unload`` and ``merge_and_unload``: W, or W and the merged changes.

    PEFT's recipe wants the residual of the adapter that it names. The module keeps a record then, for a new start.
    """
    base: torch.nn.Module = layer.get_base_layer()
    if merge:
        for each in _wrapping(layer):
            each.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    for each in (*_wrapping(layer), *inside(base)):
        if not each.merged and records(each):
            _unload_weight(each, [] if merge else _of_recipe(each))
    if inside(base):
        return type(layer).unload_and_optionally_merge_module(layer, False, safe_merge, None)  # type: ignore[no-any-return]
    return base


def _wrapping(layer: Any) -> Iterator[Any]:
    """A layer, and the layers of further parameters of its module that it wraps."""
    while hasattr(layer, "base_layer"):
        yield layer
        layer = layer.base_layer


def _unload_weight(layer: Any, wanted: list[InitRecord]) -> None:
    """Leave the residual of a record in the weight, or W."""
    if wanted:
        layout, found = layout_of(layer), state.terms(layer)
        subtracted = [0.0] * len(found.factors)
        subtracted[found.groups[wanted[0].adapter]] = wanted[0].report.scaling
        state.rebase_(layer, subtracted)
        set_records(layout.module, [replace(wanted[0], adapter=GONE, shared=False)], layout.parameter)
    else:
        forward.restore_(layer)


def _of_recipe(layer: Any) -> list[InitRecord]:
    """Records of the adapters of PEFT's recipe."""
    return [record for record in records(layer) if record.adapter in _keeping.get()]


@contextlib.contextmanager
def keeping_residuals(adapters: frozenset[str]) -> Iterator[None]:
    """Context in which a model is unloaded that keeps the residuals of these adapters."""
    token = _keeping.set(adapters)
    try:
        yield
    finally:
        _keeping.reset(token)


def check_one_residual(layer: Any) -> None:
    """Refuse to keep the residuals of several adapters that differ.

    Raises:
        ValueError: with the name of the layer.
    """
    wanted = _of_recipe(layer)
    if any(record.lora_A is not wanted[0].lora_A for record in wanted):
        names = " and ".join(sorted({repr(record.adapter) for record in wanted}))
        raise ValueError(
            f"{state.label(layer)}: the adapters {names} have init_lora_weights=True, so that unload() keeps the "
            "residual of each, but these differ. Set it for one of them, or delete the others first"
        )


def check_kept(layer: Any, merge: bool, adapter_names: list[str] | None) -> None:
    """Refuse to unload a quantized weight that is neither merged nor the residual that ``unload`` keeps."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    merges = layer.merged or (merge and any(name in adapters_of(layer) for name in names))
    if is_quantized(layer.get_base_layer()) and not merges:
        wanted = [] if merge else _of_recipe(layer)
        state.check_own(layer, wanted[0] if wanted else None)
