"""PEFT's hotswap, which writes another adapter's values over those of an adapter that exists.

PEFT swaps with a function and not with a method of the model, so that no attribute of the model can guard it. The
function is replaced once in a process that makes or unpickles a guarded model. It stays replaced when a patch ends,
because the models live on, and passes the calls for all other models through. ``hotswap_adapter`` finds the
replacement also where it was imported before; a ``hotswap_adapter_from_state_dict`` that was imported by name before
is PEFT's own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from ...adapter.layers import lora_layers
from ...adapter.layouts import adapters_of
from ..injection.additions import changes_the_base
from ..injection.targets import is_pissa
from ..saving.load import Source, replace_records
from ..weights import state
from ..weights.record import InitRecord, of_adapter, records

Function = Callable[..., Any]

_once = threading.Lock()
# What PEFT has read for a hotswap in this thread: its source, and one of its tensors.
_read: ContextVar[tuple[Source, Tensor] | None] = ContextVar("pissa_kernels_hotswap", default=None)


def guard_hotswap() -> None:
    """Replace PEFT's two functions, once in a process."""
    if not _once.acquire(blocking=False):
        return
    from peft.utils import hotswap

    for name, wrap in (("load_peft_weights", _wrap_load), ("hotswap_adapter_from_state_dict", _wrap_swap)):
        function = getattr(hotswap, name)
        setattr(hotswap, name, functools.wraps(function)(wrap(function)))


def _wrap_load(previous: Function) -> Function:
    """Remember where the values of a hotswap come from."""

    def load_peft_weights(model_id: Any, *args: Any, **kwargs: Any) -> Any:
        found = previous(model_id, *args, **kwargs)
        _read.set(next(((Source(model_id, kwargs), value) for value in found.values()), None))
        return found

    return load_peft_weights


def _wrap_swap(previous: Function) -> Function:
    """Swap the initial factors with the values; refuse values whose initial factors are not known."""

    def swap(model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> None:
        read, plain = _read.get(), getattr(model, "_orig_mod", model)
        _read.set(None)
        values = []
        if _is_guarded(plain):
            # values that come from elsewhere were not read by the last call
            source = read[0] if read is not None and any(value is read[1] for value in state_dict.values()) else None
            values = _values(plain, source, adapter_name, config)
        previous(model, state_dict, adapter_name, config, *args, **kwargs)
        if values:
            replace_records(plain.peft_config[adapter_name], adapter_name, values)

    return swap


def _is_guarded(model: nn.Module) -> bool:
    """Whether a model was made under a patch, or has layers with initial factors."""
    return "load_adapter" in vars(model) or any(records(layer) for _, layer in lora_layers(model))


def _values(model: nn.Module, source: Source | None, adapter: str, config: Any) -> list[tuple[Any, InitRecord | None]]:
    """The layers whose records change, and the new ones.

    Raises:
        ValueError: values of PiSSA without initial factors, or of another weight.
    """
    if source is not None and source.has_initial(adapter):
        return source.values_for(model, adapter)
    layers = [layer for _, layer in lora_layers(model) if adapter in adapters_of(layer)]
    if layers and (is_pissa(config) or changes_the_base(config)):
        raise ValueError(
            f"{state.label(layers[0])}: the values to swap in come without initial factors, so that the adapter "
            f"{adapter!r} would not be known to change the weight. Save them under patch_peft(), or convert them to a "
            "plain LoRA"
        )
    return [(layer, None) for layer in layers if of_adapter(layer, adapter)]
