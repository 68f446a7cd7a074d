"""A model in pieces, under FSDP or DeepSpeed ZeRO-3: what is refused until it is gathered, and checked afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...adapter.layers import placed_lora_layers
from ...adapter.layouts import layout_of
from ...adapter.names import KEY_PREFIX
from ...checks import layer_context
from ...runtime.gathering import is_partitioned
from ...runtime.shards import is_sharded
from ..weights import known, state
from ..weights.record import fingerprint, matches, of_adapter, records
from ..weights.wrappers import base_of, own_names
from .start import stored_key

_ZERO = "deepspeed.zero.GatheredParameters(list(model.parameters())"
_FSDP1 = "FullyShardedDataParallel.summon_full_params(model"


def piece_of(layer: Any) -> str | None:
    """What holds a LoRA layer's weight, A or B in pieces at this moment; None where they are whole or a ``DTensor``."""
    layout = layout_of(layer)
    factors = [factor for adapter in layout.adapters for factor in layout.factors(adapter)]
    if any(map(is_partitioned, (layout.weight, *factors))):
        return "DeepSpeed ZeRO-3 has partitioned it"
    if layout.weight.ndim < 2 or any(factor.ndim < 2 for factor in factors):
        return "FSDP keeps flat pieces of it"
    return None


def check_gathered(layer: Any, operation: str) -> None:
    """Refuse to change the weight of a layer that is in pieces.

    Args:
        layer: the layer.
        operation: what would change it, such as "merge".

    Raises:
        ValueError: with the name of the layer, and how to gather it.
    """
    found = piece_of(layer)
    if found is not None:
        how = f"{_ZERO}, modifier_rank=0)" if found.startswith("DeepSpeed") else f"{_FSDP1})"
        raise ValueError(
            f"{state.label(layer)}: cannot {operation} while {found}; call it within {how} in all processes, or save "
            "the adapter and merge it in one process"
        )


def check_saved(model: nn.Module, parameters: Mapping[str, Any]) -> None:
    """Refuse to write the tensors of a model whose values are in pieces that are no ``DTensor``.

    Args:
        model: the model.
        parameters: its parameters by name.

    Raises:
        ValueError: with how to gather them.
    """
    for name, parameter in parameters.items():
        if is_partitioned(parameter):
            raise ValueError(
                f"DeepSpeed ZeRO-3 has partitioned {name!r} {tuple(parameter.ds_shape)}; call save_pissa within "
                f"{_ZERO}) in all processes, of which the first one writes"
            )
    for name, _, layer in placed_lora_layers(model):
        if records(layer) and layout_of(layer).weight.ndim < 2:
            raise ValueError(
                f"FSDP keeps flat pieces of the weight of layer {name!r}; call save_pissa within {_FSDP1}) in all "
                "processes, of which the first one writes"
            )


def check_residuals(model: Any, adapter_name: str, tensors: Mapping[str, Any]) -> None:
    """Refuse gathered weights that are not the residuals which the records say.

    Args:
        model: the model, of which some weights are a ``DTensor``.
        adapter_name: the adapter whose residuals they are.
        tensors: the whole weights by the base model's own names.

    Raises:
        ValueError: with the name of the layer.
    """
    base = base_of(model)
    named = own_names(base)
    for name, place, layer in placed_lora_layers(base):
        record, layout = of_adapter(layer, adapter_name), layout_of(layer)
        weight = tensors.get(str(named(stored_key(place, layer))))
        if record is None or weight is None or not is_sharded(layout.weight):
            continue
        with layer_context(state.label_of(layer, name)):
            if record.report.quantization is not None:
                raise ValueError("the weight is quantized and sharded, which save_pissa cannot gather")
            product = known.sampled(weight, (record.lora_A, record.lora_B), layout)
            found = fingerprint(weight).double() + record.report.scaling * product
            if not matches(record.before, found, (record.report.dtype, weight.dtype), other=record.after):
                raise ValueError(
                    "the stored weight is no longer the one that PiSSA left here, so it is not the residual of the "
                    "initial adapter. Load the model again under patch_peft()"
                )


def check_factors(peft_model: Any, adapter_name: str, tensors: Mapping[str, Any]) -> None:
    """Refuse a state dict from which PEFT would save an adapter without the A or B of a layer, or with a piece.

    Args:
        peft_model: the model.
        adapter_name: an adapter of it.
        tensors: the state dict, with names without wrappers.

    Raises:
        ValueError: with the name of the layer.
    """
    base = base_of(peft_model)
    named = own_names(base)
    for name, place, layer in placed_lora_layers(base):
        record = of_adapter(layer, adapter_name)
        if record is None or named(stored_key(place, layer)) is None:  # of a copy, which PEFT saves in another way
            continue
        for key, factor in zip(layout_of(layer).keys, (record.lora_A, record.lora_B), strict=True):
            container, dot, rest = key.partition(".")
            whole = f"{KEY_PREFIX}{place}.{container}.{adapter_name}{dot}{rest}"
            found = tensors.get(whole)
            what = None
            if found is None:
                what = "no"
            elif tuple(found.shape) != tuple(factor.shape):
                what = f"a piece {tuple(found.shape)} instead of {tuple(factor.shape)} of"
            elif is_sharded(found) and not getattr(peft_model, "_tp_size", None):  # PEFT gathers tensor-parallel ones
                what = "a DTensor, of which this process has a part, for"
            if what is not None:
                raise ValueError(
                    f"layer {name!r}: the state to save has {what} {whole!r}. Pass the whole state_dict=…, or call "
                    f"save_pretrained within {_ZERO}) or {_FSDP1}) in all processes"
                )
