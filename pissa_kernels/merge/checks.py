"""What a merge refuses before it reads a weight: adapters and checkpoints that do not belong together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapter.names import ADAPTER_FOLDER, CONFIG_NAME, WEIGHTS_NAME
from ..checkpoint.manifest import MANIFEST, Manifest
from ..convert.adapter import AdapterFile, find_initial
from ..convert.plain import MARK as PLAIN
from ..files.folder import Checkpoint
from ..files.header import read_header, read_tensor
from ..ops import WEIGHT_DTYPES
from ..peft.saving.sidecar import INITIAL_NAME
from ..quantize.stored import StoredWeight
from .names import Place

# Initializers with which PEFT changes the base weight whenever it loads the adapter.
_CHANGING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Settings under which the trained layer is more than the base layer and s·B·A.
_UNSUPPORTED = ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "megatron_config")


def check_adapter(adapter: AdapterFile, out: Path) -> None:
    """Refuse an adapter whose layers are more than their base layers and s·B·A, or have other base layers than OUT."""
    folder, config = adapter.path.parent, adapter.config
    if setting := next((key for key in _UNSUPPORTED if config.get(key)), None):
        raise ValueError(
            f"{folder / CONFIG_NAME} sets {setting}, so the adapter is more than s·B·A per layer; merge it with PEFT "
            "(merge_and_unload)"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGING_INITS) and not _starts_from(adapter, out):
        raise ValueError(
            f"{folder / CONFIG_NAME} has the init_lora_weights {init!r}, with which the adapter's base is a model that "
            f"PEFT changed in memory, and {out} does not hold that with its initial adapter. Save it with save_pissa; "
            "or make the adapter a LoRA of the original model with convert, and merge that one into the original model"
        )


def _starts_from(adapter: AdapterFile, out: Path) -> bool:
    """Whether an adapter was trained from the initial factors in the ``pissa_init`` of a residual checkpoint."""
    folder, initial = adapter.path.parent, out / ADAPTER_FOLDER
    if not ((folder / INITIAL_NAME).is_file() and (initial / CONFIG_NAME).is_file()):
        return False
    own, other = find_initial(folder), find_initial(initial)
    if own.layers.keys() != other.layers.keys():
        return False
    with own.path.open("rb") as first, other.path.open("rb") as second:
        return all(
            torch.equal(read_tensor(first.fileno(), mine).float(), read_tensor(second.fileno(), theirs).float())
            for name, layer in own.layers.items()
            for mine, theirs in ((layer.A, other.layers[name].A), (layer.B, other.layers[name].B))
        )


def check_origin(checkpoint: Checkpoint, adapter: AdapterFile, manifest: Manifest | None) -> None:
    """Refuse a plain LoRA of the original model on the residual one, and an adapter of the residual on the original."""
    folder = adapter.path.parent
    if manifest is not None and PLAIN.items() <= read_header(adapter.path).metadata.items():
        raise ValueError(
            f"{folder} is a plain LoRA of the original model, which convert made, and {checkpoint.folder} holds "
            f"residuals; merge it into {manifest.source}"
        )
    named = Path(adapter.config.get("base_model_name_or_path") or "")
    residual = Manifest.read(named).source if named.name and (named / MANIFEST).is_file() else None
    if residual is not None and same_folder(Path(residual), checkpoint.folder):
        raise ValueError(
            f"{folder} was trained on the residual checkpoint {named}, as its config says, and not on "
            f"{checkpoint.folder}; give that one"
        )
    if (checkpoint.folder / CONFIG_NAME).is_file() and not same_folder(folder, checkpoint.folder):
        stem = WEIGHTS_NAME.partition(".")[0]
        if weights := [name for name in checkpoint.left_out if "/" not in name and name.startswith(f"{stem}.")]:
            raise ValueError(
                f"{checkpoint.folder} holds an adapter of its own ({CONFIG_NAME}, {weights[0]}), which transformers "
                "loads on top of the model; merge that one first, or move its files away"
            )


def check_quantization(checkpoint: Checkpoint, config: Mapping[str, Any], stored: Mapping[str, StoredWeight]) -> None:
    """Refuse a checkpoint in a quantized format that is not read."""
    quantization = config.get("quantization_config")
    if quantization and not stored:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise TypeError(
            f"{checkpoint.folder} is quantized ({method or 'quantization_config'}) and has no weights in NF4, FP4 or "
            "int8 of bitsandbytes, which merge dequantizes; merge with PEFT (merge_and_unload)"
        )


def check_place(
    checkpoint: Checkpoint,
    adapter: AdapterFile,
    key: str,
    place: Place,
    entry: tuple[torch.dtype, tuple[int, ...]],
    dequantized: bool,
) -> None:
    """Refuse a tensor that does not fit what the adapter has for it.

    Args:
        checkpoint: the checkpoint.
        adapter: the adapter.
        key: the tensor.
        place: what the adapter does to it.
        entry: dtype and shape of the tensor, (out, in) if it was dequantized.
        dequantized: whether it is quantized in the checkpoint.
    """
    dtype, shape = entry
    if place.copy is not None and (place.copy.shape != shape or dequantized):
        raise ValueError(
            f"{adapter.path}: {place.copy.name!r} has shape {place.copy.shape}, and {key!r} of {checkpoint.folder} is "
            + ("quantized" if dequantized else f"{shape}")
            + "; give the checkpoint that the adapter was trained on"
        )
    if place.layer is None:
        return
    layer = adapter.layers[place.layer]
    expected = layer.weight_shape if place.piece is None else place.piece.shape(layer)
    if place.transposed and place.piece is None and not dequantized:
        expected = expected[::-1]
    if layer.packing.groups > 1:
        raise ValueError(
            f"layer {place.layer!r} is a convolution with {layer.packing.groups} groups: its adapter reads the inputs "
            "of all of them, which the weight has no place for; load the adapter with PEFT, which does not merge it "
            "either"
        )
    if shape != expected:
        raise ValueError(
            f"layer {place.layer!r}: the factors in {adapter.path.parent} are for a weight {expected}, and {key!r} of "
            f"{checkpoint.folder} is {shape}; give the checkpoint that the adapter was trained on"
        )
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"layer {place.layer!r}: {key!r} of {checkpoint.folder} has dtype {dtype}; accepted are float32, float16 "
            "and bfloat16"
        )


def same_folder(path: Path, other: Path) -> bool:
    """Whether the first path is the folder that the second is."""
    return path.is_dir() and path.samefile(other)
