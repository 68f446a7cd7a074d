"""What PEFT's ``save_pretrained`` gets wrong with PiSSA: base weights of embeddings, and conversions to plain LoRA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapter.layers import lora_layers, placed_lora_layers
from ...adapter.layouts import layout_of
from ...adapter.names import KEY_PREFIX
from ...files.atomic import atomic_file
from ..weights.record import records
from ..weights.state import add_, weight_of

_BASE_WEIGHT = ".base_layer.weight"


def embeddings_to_save(peft_model: Any, adapter: str, asked: Any) -> Any:
    """What to answer to PEFT for ``save_embedding_layers``.

    With "auto", PEFT saves the base weight of a head or an embedding that is adapted. With PiSSA that is a residual,
    which another base model must not get, and a loader computes it again. A changed vocabulary does need its weights.
    """
    config: Any = getattr(peft_model, "config", None)
    source = peft_model.peft_config[adapter].base_model_name_or_path
    if asked != "auto" or not hasattr(config, "vocab_size") or not source:
        return False if asked == "auto" else asked
    try:
        stored = type(config).from_pretrained(source)
    except (OSError, ValueError):  # not here, and not on a hub that can be reached: PEFT too takes it for unchanged
        return False
    return "auto" if stored.vocab_size != config.vocab_size else False


def check_convertible(peft_model: Any, adapter: str) -> None:
    """Refuse an adapter that PEFT's conversion cannot turn into a plain LoRA.

    Raises:
        ValueError: the adapter trains biases.
    """
    bias = getattr(peft_model.peft_config.get(adapter), "bias", "none")
    if bias != "none":
        raise ValueError(
            f"the adapter {adapter!r} trains biases (bias={bias!r}), and PEFT cannot load its initial adapter beside "
            "it; save it without path_initial_model_for_weight_conversion and convert it with convert_adapter"
        )


def complete_conversion(peft_model: Any, adapter: str, folder: Path, arguments: dict[str, Any]) -> None:
    """Add the trained weights that PEFT's conversion omits, and correct those that it writes in a wrong order.

    PEFT 0.21 writes A and B only. Without the others a converted classifier does not load, magnitudes have their
    initial values, and the LoRA of an embedding is lost. Where an adapter is of several matrices, [A; A₀] mixes the
    rows of one matrix with those of another.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict, load_peft_weights
    from safetensors.torch import load_file, save_file

    safe = arguments["safe_serialization"]
    path = folder / (SAFETENSORS_WEIGHTS_NAME if safe else WEIGHTS_NAME)
    trained = get_peft_model_state_dict(
        peft_model,
        state_dict=arguments.get("kwargs", {}).get("state_dict"),
        adapter_name=adapter,
        save_embedding_layers=arguments["save_embedding_layers"],
    )
    converted = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    initial = load_peft_weights(os.fspath(arguments["path_initial_model_for_weight_conversion"]), device="cpu")
    layers = {f"{KEY_PREFIX}{name}{_BASE_WEIGHT}": layer for name, layer in lora_layers(peft_model)}
    missing = {}
    for key, value in trained.items():
        if key in converted:
            continue
        kind = key.rpartition(".")[2]
        if kind in ("lora_embedding_A", "lora_embedding_B"):
            if key not in initial:
                raise ValueError(f"the initial adapter has no {key!r}; make it with save_pissa, and convert again")
            value = _stacked(value, initial[key], kind[-1])
        elif key in layers:
            value = _original(layers[key], adapter, initial, key.removesuffix(_BASE_WEIGHT))
        missing[key] = value.detach().to("cpu", copy=True).contiguous()
    for _, place, layer in placed_lora_layers(peft_model):
        layout, key = layout_of(layer), f"{KEY_PREFIX}{place}.lora_A.weight"
        if layout.parts > 1 and key in converted:
            missing[key] = _rows_of_parts(trained[key].detach().to("cpu"), initial[key], layout.parts)
    if not missing:
        return
    with atomic_file(path) as temporary:
        if safe:
            save_file({**converted, **missing}, temporary, metadata={"format": "pt"})
        else:
            torch.save({**converted, **missing}, temporary)


def _original(layer: Any, adapter: str, initial: dict[str, Tensor], key: str) -> Tensor:
    """The weight of a layer before PiSSA, also where the model is a residual checkpoint and has no records."""
    weight = weight_of(layer, None)
    factors = [initial.get(f"{key}.lora_{factor}.weight") for factor in "BA"]
    if records(layer) or any(factor is None for factor in factors):
        return weight
    B, A = (factor.float() for factor in factors if factor is not None)
    total = weight.float().clone(memory_format=torch.preserve_format)
    add_(total, [(A, B)], [float(layer.scaling[adapter])], layout_of(layer))
    return total.to(weight.dtype)


def _rows_of_parts(trained: Tensor, initial: Tensor, parts: int) -> Tensor:
    """[A; A₀] of each of several matrices. The columns of [B, −B₀] are in their order already.

    Args:
        trained: (P·r, …), the rows of one matrix after those of another.
        initial: (P·r, …).
    """
    A, A0 = (factor.reshape(parts, -1, *factor.shape[1:]) for factor in (trained, initial.to(trained)))
    return torch.cat([A, A0], dim=1).flatten(0, 1).contiguous()


def _stacked(trained: Tensor, initial: Tensor, factor: str) -> Tensor:
    """[A; A₀] or [B, −B₀], for the difference of the two products."""
    initial = initial.to(trained)
    return torch.cat([trained, initial]) if factor == "A" else torch.cat([trained, -initial], dim=1)
