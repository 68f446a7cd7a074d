"""PEFT's hotswap, which writes another adapter's values over those of an adapter that exists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from . import state
from .additions import changes_the_base, is_pissa
from .load import Source, replace_records
from .record import of_adapter
from .scope import Session
from .state import adapted_layers

Function = Callable[..., Any]

# Source of the values that PEFT has read for a hotswap in this thread.
_read: ContextVar[Source | None] = ContextVar("pissa_kernels_hotswap", default=None)


def wrap_load_peft_weights(session: Session, previous: Function) -> Function:
    """Remember where the values of a hotswap come from."""

    def load_peft_weights(model_id: Any, *args: Any, **kwargs: Any) -> Any:
        if session.applies():
            _read.set(Source(model_id, kwargs))
        return previous(model_id, *args, **kwargs)

    return load_peft_weights


def wrap_swap(session: Session, previous: Function) -> Function:
    """Swap the initial factors with the values; refuse values whose initial factors are not known."""

    def swap(model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> None:
        run = functools.partial(previous, model, state_dict, adapter_name, config, *args, **kwargs)
        if not session.applies():
            run()
            return
        source = _read.get()
        _read.set(None)
        plain = getattr(model, "_orig_mod", model)
        own = [layer for _, layer in adapted_layers(plain) if of_adapter(layer, adapter_name)]
        values = source.values_for(plain, adapter_name) if source is not None else []
        if own and (source is None or not source.has_initial(adapter_name)):
            if is_pissa(config) or changes_the_base(config):
                raise ValueError(
                    f"{state.label(own[0])}: the adapter {adapter_name!r} holds PiSSA factors, and the values to swap "
                    "in come without initial factors. Save them under patch_peft(), or convert them to a plain LoRA"
                )
            values = [(layer, None) for layer in own]
        run()
        replace_records(plain.peft_config[adapter_name], adapter_name, values)

    return swap
