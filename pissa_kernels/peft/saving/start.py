"""What a model was before its adapters were trained: the values at the start, and the base model's own tensor names.

PEFT trains more than A and B, some of it in place: magnitudes, biases, copies of modules, token embeddings, the LoRA of
an embedding. Copies of what nothing else keeps are taken when an adapter is added. They are an attribute of the base
model, and so are copied and pickled with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter.layers import lora_layers, placed_lora_layers
from ...adapter.layouts import layout_of
from ...adapter.names import module_name, own_name
from ...runtime.gathering import is_partitioned, shape_of
from ...runtime.shards import is_sharded
from ..scope import Session
from ..weights.quantized import in_standard_order, is_quantized
from ..weights.record import of_adapter, records
from ..weights.state import check_own, weight_of
from ..weights.wrappers import base_of, own_names, wrapped_in

_ATTRIBUTE = "pissa_start"
_STATISTICS = re.compile(r"\.weight\.(nested_)?(absmax|quant_map|quant_state)")


@dataclass
class Start:
    """A base model at the start.

    Attributes:
        shapes: shape of every tensor in the base model's state dict before PEFT changed the model, by its name.
        values: copies on the CPU by the adapter's name and by the key in the adapter's file, without its prefix. A and
            B of a layer with a record are not here.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def wrap_inject_adapter(session: Session, previous: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the start of a model and of each adapter that PEFT adds to it."""

    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if session.applies():
            in_standard_order(model)
        if session.applies() and not any(wrapped_in(module) is not None for module in model.modules()):
            model.__dict__[_ATTRIBUTE] = Start(_shapes(model))
        previous(self, model, adapter_name, *args, **kwargs)
        if session.applies():
            _keep_values(self, model, adapter_name)

    return inject_adapter


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a model's state dict, by their own names, also of those that ZeRO-3 has partitioned."""
    found = {own_name(key): tuple(value.shape) for key, value in _tensors(model.state_dict())}
    parameters = ((own_name(key), value) for key, value in model.named_parameters(remove_duplicate=False))
    return found | {key: shape_of(value) for key, value in parameters if is_partitioned(value) and key in found}


def _keep_values(tuner: Any, model: nn.Module, adapter_name: str) -> None:
    if not any(record.adapter == adapter_name for _, layer in lora_layers(model) for record in records(layer)):
        return
    start: Start = model.__dict__.setdefault(_ATTRIBUTE, Start())
    recorded = recorded_factors(model, adapter_name)
    try:
        state = adapter_state(tuner, adapter_name)
    except ValueError:  # an adapter that cannot be saved can be trained
        return
    start.values[adapter_name] = {
        key: value.detach().to("cpu", copy=True)
        for key, value in state.items()
        if key not in recorded and not value.is_meta
    }


def adapter_state(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """What PEFT saves of an adapter, without base weights of embeddings, by the name in the base model.

    Raises:
        ValueError: PEFT cannot save this adapter.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.other import TrainableTokensWrapper

    named = own_names(model)
    # of the base model, an adapter can have the biases only; the rest would be gathered under tensor parallelism
    state = {key: value for key, value in model.state_dict().items() if named(key) is None or key.endswith("bias")}
    # PEFT looks for the tokens of every adapter in every such wrapper
    tokens = ((name, module) for name, module in model.named_modules() if isinstance(module, TrainableTokensWrapper))
    absent = {
        f"{name}.token_adapter.trainable_tokens_delta"
        for name, module in tokens
        if adapter_name not in module.token_adapter.trainable_tokens_delta
    }
    state |= dict.fromkeys((f"{key}.{adapter_name}" for key in absent), torch.empty(0))
    try:
        found = get_peft_model_state_dict(model, state, adapter_name, save_embedding_layers=False)
    except KeyError as error:  # a LoRA layer in a copy that another adapter trains, or the other way round
        raise ValueError(f"PEFT cannot save the adapter {adapter_name!r}: the model has no tensor {error}") from None
    prefix = "model." if isinstance(model, BaseTuner) else ""
    return {module_name(key).removeprefix(prefix): value for key, value in found.items() if key not in absent}


def recorded_factors(base: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """A₀ and B₀ of every layer with a record, by the same names as :func:`adapter_state`."""
    return {
        f"{place}.{key}": factor
        for _, place, layer in placed_lora_layers(base)
        if (record := of_adapter(layer, adapter_name)) is not None
        for key, factor in zip(layout_of(layer).keys, (record.lora_A, record.lora_B), strict=True)
    }


def initial_state(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """What PEFT saved of an adapter if it had saved it before the training, in today's dtypes.

    Raises:
        ValueError: an initial value is not known any more; the message names the parameter.
    """
    base = base_of(model)
    start: Start = base.__dict__.get(_ATTRIBUTE, Start())
    known = {
        **_magnitudes(base, adapter_name, start.values.get(adapter_name, {})),
        **start.values.get(adapter_name, {}),
        **_kept_by_wrappers(base, adapter_name),
        **recorded_factors(base, adapter_name),
    }
    state = adapter_state(model, adapter_name)
    named = own_names(base)
    for _, place, layer in placed_lora_layers(base):
        key = f"{place}.{layout_of(layer).keys[0]}"
        recorded = of_adapter(layer, adapter_name) is not None
        if recorded and key not in state and named(stored_key(place, layer)) is not None:
            raise ValueError(
                f"PEFT does not save {key!r} of the adapter {adapter_name!r}, because it is in a module that another "
                "adapter trains as a copy; delete that adapter first"
            )
    for key, value in state.items():
        initial = known.get(key)
        if initial is None or initial.shape != value.shape:
            raise ValueError(
                f"the initial value of {key!r}, which the adapter {adapter_name!r} trains, is not known any more; call "
                "save_pissa with the model that get_peft_model made under patch_peft()"
            )
        state[key] = initial.to(value.dtype)
    return state


def _kept_by_wrappers(base: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Initial values of the modules and tokens that PEFT trains as copies, beside the originals."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    known: dict[str, Tensor] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        if isinstance(module, ModulesToSaveWrapper):
            for key, value in module.original_module.state_dict().items():
                # under the last two names with bias="all", which selects keys that end in "bias"
                names = (f"{name}.{part}{key}" for part in ("", "original_module.", "modules_to_save."))
                known |= dict.fromkeys(names, value)
        elif isinstance(module, TrainableTokensWrapper):
            originals = module.token_adapter.trainable_tokens_original
            if adapter_name in originals:
                known[f"{name}.token_adapter.trainable_tokens_delta"] = originals[adapter_name]
    return known


def _magnitudes(base: nn.Module, adapter_name: str, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's magnitudes at the start: the norms of W_res + s·B₀·A₀, by PEFT's own computation; not those ``kept``."""
    known = {}
    for _, name, layer in placed_lora_layers(base):
        record = of_adapter(layer, adapter_name)
        if record is None or adapter_name not in layer.lora_magnitude_vector:
            continue
        if f"{name}.lora_magnitude_vector" in kept or is_sharded(layer.get_base_layer().weight):
            continue
        magnitude = layer.lora_magnitude_vector[adapter_name]
        again = type(magnitude)(fan_in_fan_out=magnitude.fan_in_fan_out)
        device = layer.get_base_layer().weight.device
        again.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=record.lora_A.to(device),
            lora_B=record.lora_B.to(device),
            scaling=record.report.scaling,
        )
        known[f"{name}.lora_magnitude_vector"] = again.weight.detach()
    return known


def residual_state(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """The base model's state dict with its own names: residuals of one adapter, and everything else as at the start.

    Raises:
        ValueError: the names or shapes are not those of the base model before PEFT changed it, or the base model itself
            is trained.
    """
    base = base_of(model)
    start: Start = base.__dict__.get(_ATTRIBUTE, Start())
    named = own_names(base)
    state = {own: value for key, value in base.state_dict().items() if (own := named(key)) is not None}
    for adapter, config in model.peft_config.items():
        bias = getattr(config, "bias", "none")
        if bias != "none" and adapter not in start.values:
            raise ValueError(
                f"the adapter {adapter!r} trains biases (bias={bias!r}), and their initial values are not known any "
                "more; call save_pissa with the model that get_peft_model made under patch_peft()"
            )
    biases = {own: value for values in start.values.values() for key, value in values.items() if (own := named(key))}
    for key, parameter in base.named_parameters():
        if parameter.requires_grad and (own := named(key)) is not None and own not in biases:
            raise ValueError(
                f"{own!r} of the base model is trained, and PEFT keeps no initial value of it; call "
                "requires_grad_(False) on it if it has not been trained"
            )
    state |= biases
    for _, place, layer in placed_lora_layers(base):
        own = named(stored_key(place, layer))
        if own in state and is_quantized(layer.get_base_layer()):
            check_own(layer, of_adapter(layer, adapter_name))
        elif own in state:
            state[own] = weight_of(layer, of_adapter(layer, adapter_name))
    _check_names(state, start.shapes)
    return state


def stored_key(place: str, layer: Any) -> str:
    """Key of the weight of a LoRA layer in the state dict of the base model.

    Args:
        place: name of the layer in it.
        layer: the layer.
    """
    inner = layer
    while hasattr(inner, "base_layer"):
        place, inner = f"{place}.base_layer", inner.base_layer
    return f"{place}.{layout_of(layer).parameter}"


def _check_names(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    found = {key: tuple(value.shape) for key, value in _tensors(state)}
    # what belongs to quantized codes may be stored in another way than it was
    found, shapes = ({key: at[key] for key in at if not _STATISTICS.search(key)} for at in (found, shapes))
    if not shapes or found == shapes:
        return
    key = next(key for key in [*shapes, *found] if found.get(key) != shapes.get(key))
    raise ValueError(
        f"the base model had {key!r} with shape {shapes.get(key, 'none')} before PEFT changed it, and has shape "
        f"{found.get(key, 'none')} now; change the base model before get_peft_model"
    )


def _tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    # a state dict may hold other objects, such as a module's extra state
    return ((key, value) for key, value in state.items() if isinstance(value, Tensor))
