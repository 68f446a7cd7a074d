"""Layers for which PEFT does not call ``pissa_init``: embeddings, convolutions, attentions, and parameters.

PEFT 0.21 leaves an embedding plain, refuses a convolution, and fails on ``nn.MultiheadAttention`` and on stacks of
experts, where it looks for a ``weight`` that they do not have.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from ...adapter.attention import mark_projection
from ...adapter.layouts import layout_of
from ...adapter.patterns import pattern_key, rank_of
from ...checks import asks_for_pissa
from ..scope import Session, replacing
from .targets import is_pissa

Function = Callable[..., Any]


def wrap_reset_parameters(session: Session, previous: Function) -> Function:
    """What PEFT calls for an embedding and a convolution, whatever their initializer is."""

    def reset_lora_parameters(layer: Any, adapter_name: str, init_lora_weights: Any) -> None:
        if session.applies() and asks_for_pissa(init_lora_weights):
            previous(layer, adapter_name, True)
            with _gathered(layer):
                session.initialize(layer, adapter_name, init_lora_weights)
        else:
            previous(layer, adapter_name, init_lora_weights)

    return reset_lora_parameters


def wrap_update_parameter(session: Session, previous: Function) -> Function:
    """Let PEFT add a plain adapter to a parameter, and initialize it then."""

    def update_layer(layer: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        init = _pissa_in(kwargs) if session.applies() else None
        previous(layer, adapter_name, *args, **(kwargs if init is None else _plain(kwargs)))
        if init is not None:
            with _gathered(layer):
                session.initialize(layer, adapter_name, init, is_cast=True)

    return update_layer


def wrap_update_attention(session: Session, previous: Function) -> Function:
    """As for a parameter, for the two weights of an attention. PEFT adds an adapter to its ``out_proj`` as well."""

    def update_layer(layer: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        init = _pissa_in(kwargs) if session.applies() else None
        previous(layer, adapter_name, *args, **(kwargs if init is None else _plain(kwargs)))
        if init is None:
            return
        mark_projection(layer)
        name = replacing.get().name
        inside = None if name is None else f"{name}.base_layer.out_proj"
        projection = layer.get_base_layer().out_proj
        with _gathered(layer), _gathered(projection):
            session.initialize(layer, adapter_name, init, is_cast=True)
            session.initialize(projection, adapter_name, init, name=inside, is_cast=True)

    return update_layer


def has_adapter(target: Any, adapter_name: str, parameter: str | None) -> bool:
    """Whether a layer is that of a parameter, and has the adapter already, as after a call that has failed elsewhere.

    Args:
        target: the module that PEFT replaces, or the LoRA layer that gets an adapter.
        adapter_name: name of the adapter.
        parameter: name of the parameter; None for a module.
    """
    same = parameter is not None and getattr(target, "parameter_name", None) == parameter
    return same and adapter_name in layout_of(target).adapters


def update(target: Any, adapter_name: str, config: Any, name: str) -> None:
    """Update the adapter of a parameter, as PEFT does for a linear layer. PEFT would wrap the parameter twice.

    Args:
        target: its LoRA layer.
        adapter_name: name of the adapter.
        config: the ``LoraConfig``.
        name: name of the parameter in the model.
    """
    key = pattern_key(config.alpha_pattern, name)
    alpha = config.lora_alpha if key is None else config.alpha_pattern[key]
    target.update_layer(adapter_name, rank_of(vars(config), name), lora_alpha=alpha, config=config)


def is_of_attention(target: Any, layer: Any) -> bool:
    """Whether a layer is that of an ``out_proj``, which PEFT makes while it replaces the attention.

    Args:
        target: the module that PEFT replaces, or the LoRA layer that gets another adapter.
        layer: a LoRA layer.
    """
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    return isinstance(base, nn.MultiheadAttention) and layer.get_base_layer() is not base


def _gathered(layer: Any) -> contextlib.AbstractContextManager[object]:
    """Context in which the weight is whole under DeepSpeed's ZeRO-3, as PEFT makes it for a linear layer."""
    from peft.utils.integrations import gather_params_ctx

    return gather_params_ctx(layout_of(layer).weight)  # type: ignore[no-any-return]


def _pissa_in(arguments: dict[str, Any]) -> str | None:
    """The PiSSA initializer that the config among the arguments of ``update_layer`` asks for; None for any other."""
    config = arguments["config"]
    return config.init_lora_weights if is_pissa(config) else None


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with PEFT's default initializer in the config."""
    config = copy.copy(arguments["config"])
    config.init_lora_weights = True
    return {**arguments, "config": config}
