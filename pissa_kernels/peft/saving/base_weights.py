"""Base weights in an adapter's file: PEFT saves them of an adapted head or embedding, and loads them into the model.

In a model with residuals they would replace what the layer stores: W by a plain LoRA's file, or another residual. The
layer computes the right function without them, so they are not loaded, after a check that they are of this model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ...adapter.layers import lora_layers
from ...adapter.names import WEIGHTS_NAME, module_name
from ...numerics import UNIT_ROUNDOFF
from ..scope import Session
from ..weights.record import InitRecord, of_adapter, records
from ..weights.state import values, weight_of
from ..weights.wrappers import unwrapped
from . import sidecar
from .load import Source, loading

# Rounding errors that merging and casting leave, in units of u·‖W‖_F.
_ROUNDINGS = 8


def wrap_set_state(session: Session, previous: Callable[..., Any]) -> Callable[..., Any]:
    """``set_peft_model_state_dict`` without the base weights of layers that store a residual.

    PEFT 0.21 loads nothing into modules that activation checkpointing or ``torch.compile`` has wrapped, so it sees the
    model without the wrappers.
    """

    def set_state(
        model: Any, state: Mapping[str, Any], adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if not session.applies():
            return previous(model, state, adapter_name, *args, **kwargs)
        if found := _recorded(model, state):
            for key, layer in found.items():
                check(key, layer, state[key], of_adapter(layer, adapter_name))
            state = {key: value for key, value in state.items() if key not in found}
        with unwrapped(model):
            return previous(model, state, adapter_name, *args, **kwargs)

    return set_state


def wrap_inject_adapter(session: Session, previous: Callable[..., Any]) -> Callable[..., Any]:
    """The same check for an adapter that is loaded, before PEFT adds it, and whether it is of the model."""

    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        source = loading.get()
        if session.applies() and source is not None:
            source.check_layers(model, adapter_name)
            if any(records(layer) for _, layer in lora_layers(model)):
                _check_file(model, source, adapter_name)
        previous(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _check_file(model: nn.Module, source: Source, adapter_name: str) -> None:
    from safetensors import safe_open

    path = sidecar.find(source.location, source.options, WEIGHTS_NAME)
    if path is None:
        return
    with safe_open(path, framework="pt") as file:
        found = _recorded(model, dict.fromkeys(file.keys()))
        initial = sidecar.find(source.location, source.options) if found else None
        given = {} if initial is None else sidecar.read(initial, adapter_name)
        for key, layer in found.items():
            check(key, layer, file.get_tensor(key), given.get(str(_layer_name(key))))


def check(key: str, layer: Any, value: Tensor, record: InitRecord | None) -> None:
    """Refuse a base weight in a file that is not the one that the layer has, up to rounding.

    Args:
        key: its key in the file.
        layer: a layer with records.
        value: the weight.
        record: the initial factors of the adapter in the file. Their residual is accepted, and W, and what is stored:
            PEFT's recipe saves the initial adapter with it.

    Raises:
        ValueError: it is none of these; the message names the layer.
    """
    for expected in (values(layer), weight_of(layer, None), weight_of(layer, record)):
        if value.shape == expected.shape:
            u = max(UNIT_ROUNDOFF.get(dtype, 0.0) for dtype in (value.dtype, expected.dtype))
            off = value.to(expected.device).double() - expected.double()
            if off.norm() <= _ROUNDINGS * u * expected.double().norm():
                return
    raise ValueError(
        f"layer {_layer_name(key)!r}, weight {tuple(value.shape)}: the file has a base weight that is neither the "
        "original weight of this model nor the adapter's residual. Load the adapter into a model of its own"
    )


def _recorded(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Layers with records whose base weights are in a file, by their keys."""
    layers = {name: layer for name, layer in lora_layers(model) if records(layer)}
    return {key: layers[name] for key in state if (name := _layer_name(key)) in layers}


def _layer_name(key: str) -> str | None:
    """Name of the layer whose base weight has this key; None for another tensor."""
    name = module_name(key)
    return name.removesuffix(".base_layer.weight") if name.endswith(".base_layer.weight") else None
