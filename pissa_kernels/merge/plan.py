"""The plan of a merge: every tensor of the result, what it is made of, and its place in the result's files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.names import ADAPTER_FOLDER, CONFIG_NAME
from ..checkpoint.config import read_config
from ..checkpoint.manifest import MANIFEST, Manifest
from ..convert.adapter import AdapterFile
from ..convert.pieces import Piece
from ..files.folder import INDEX, Checkpoint, open_checkpoint
from ..files.header import Header, TensorInfo, plan_header, read_tensor
from ..files.system import open_to_read
from ..ops import WEIGHT_DTYPES
from ..quantize.bnb import NESTED_BLOCK, STORAGE_DTYPES, FourBit
from ..quantize.stored import StoredWeight, quantized_weights
from .checks import check_adapter, check_origin, check_place, check_quantization, same_folder
from .names import ModelNames, find_places, read_trained

# In the headers of the weights. Programs that save the model again write other headers.
MARK = {"written_by": "pissa-kernels merge"}
# Dtypes that ``dtype`` changes.
_FLOATING = (torch.float64, *WEIGHT_DTYPES)


@dataclass(frozen=True)
class Values:
    """Where the values of a tensor of the result come from, before a product is added to them.

    Attributes:
        stored: tensors of a quantized weight in OUT, (out, in) when dequantized; None for a tensor as it is.
        copy: a trained copy in the adapter's file, which replaces the tensor; None for that of OUT.
        layer: name of the adapted layer whose product is added; None for none.
        transposed: whether the result is stored (in, out).
        piece: which matrices of a stack the tensor has; None for a weight that is one matrix.
    """

    stored: StoredWeight | None = None
    copy: TensorInfo | None = None
    layer: str | None = None
    transposed: bool = False
    piece: Piece | None = None


@dataclass(frozen=True)
class MergeJob:
    """A merge to be done.

    Attributes:
        checkpoint: OUT.
        adapter: TRAINED.
        headers: header of each safetensors file of the result, by name.
        values: origin of every tensor of the result, by key.
        files: files of OUT to copy.
        texts: files that are written anew, by name.
        notes: remarks for the caller, one sentence each.
    """

    checkpoint: Checkpoint
    adapter: AdapterFile
    headers: Mapping[str, Header]
    values: Mapping[str, Values]
    files: tuple[str, ...]
    texts: Mapping[str, str]
    notes: tuple[str, ...]

    def names(self) -> set[str]:
        """Paths of all files of the result, with "/"."""
        return {*self.headers, *self.files, *self.texts}


def plan_merge(out: Path, trained: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> MergeJob:
    """Plan a merge, and refuse everything that can be refused without the values of a tensor.

    Args:
        out: folder of the checkpoint.
        trained: folder of the adapter that was trained on it.
        dtype: dtype of all floating-point tensors of the result; None to keep theirs.
        trust_remote_code: whether to run the Python code that comes with the checkpoint to build its model.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder or a file is missing.
        TypeError, ValueError: a file is damaged, or the adapter cannot be merged into the checkpoint.
    """
    checkpoint = open_checkpoint(out)
    manifest = Manifest.read(out) if (out / MANIFEST).is_file() else None
    config = read_config(checkpoint, quantized=True)
    stored = quantized_weights(checkpoint.tensors())
    entries = _dequantized(checkpoint, stored, config)
    names = ModelNames(checkpoint, dict(entries), quantized=bool(stored), remote_code=trust_remote_code)
    adapter = read_trained(trained, manifest, names)
    check_adapter(adapter, out)
    check_origin(checkpoint, adapter, manifest)
    check_quantization(checkpoint, config, stored)
    places = find_places(adapter, manifest, names)
    values: dict[str, Values] = {key: Values(weight) for key, weight in stored.items()}
    for key, place in places.items():
        check_place(checkpoint, adapter, key, place, entries[key], dequantized=key in stored)
        values[key] = Values(stored.get(key), place.copy, place.layer, place.transposed, place.piece)
        shape = entries[key][1]
        if key in stored and place.transposed:
            entries[key] = entries[key][0], shape[::-1]
    if dtype is not None:
        entries = {key: (dtype if kind in _FLOATING else kind, shape) for key, (kind, shape) in entries.items()}
    return MergeJob(
        checkpoint,
        adapter,
        headers := _headers(checkpoint, entries),
        {key: values.get(key, Values()) for key in entries},
        tuple(_other_files(checkpoint, trained, config_changes=bool(stored) or dtype is not None)),
        _texts(checkpoint, config, headers, dtype, quantized=bool(stored)),
        tuple(_notes(checkpoint, adapter)),
    )


Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _dequantized(checkpoint: Checkpoint, stored: Mapping[str, StoredWeight], config: Mapping[str, Any]) -> Entries:
    """Dtype and shape of every tensor once weights are dequantized. Those in int8 get the dtype of the model."""
    belonging = {key for weight in stored.values() for key in weight.keys.values()}
    infos = {key: info for key, (_, info) in checkpoint.tensors().items() if key in stored or key not in belonging}
    entries: Entries = {}
    for key, info in infos.items():
        if key in stored and stored[key].kind == "int8":
            entries[key] = _dtype_of(config, (infos[other] for other in infos if other not in stored)), info.shape
        elif key in stored:
            entries[key] = _described(checkpoint, stored[key])
        elif info.torch_dtype is None:
            raise ValueError(f"{checkpoint.folder}: {key!r} has dtype {info.dtype}, which this package does not write")
        else:
            entries[key] = info.torch_dtype, info.shape
    return entries


def _described(checkpoint: Checkpoint, weight: StoredWeight) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of a weight in 4 bits, from the JSON beside its codes, once all its tensors have the right sizes.

    bitsandbytes does not check them.
    """
    tensors = checkpoint.tensors()
    infos = {suffix: tensors[key][1] for suffix, key in weight.keys.items()}
    state = next(suffix for suffix in infos if suffix.startswith("weight.quant_state."))
    try:
        record = json.loads(bytes(_read(checkpoint, weight.keys[state]).tolist()))
        dtype, (m, n), double = getattr(torch, record["dtype"]), record["shape"], "weight.nested_absmax" in infos
        if dtype not in WEIGHT_DTYPES or record.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
            raise ValueError(f"unknown {record}")
        storage = infos["weight"].torch_dtype
        if storage not in STORAGE_DTYPES:
            raise ValueError(f"its codes are {infos['weight'].dtype}")
        layout = FourBit(weight.kind, record["blocksize"], double, storage).layout((m, n))
        for suffix, (kind, shape) in layout.items():
            found = infos[suffix].torch_dtype, infos[suffix].shape
            if suffix != state and found != (kind, shape):
                raise ValueError(f"{suffix} is {found[0]} {found[1]}, not {kind} {shape}")
    except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{checkpoint.folder}: the quantized weight of {weight.module!r} is damaged: {type(error).__name__} {error}"
        ) from None
    return dtype, (m, n)


def _read(checkpoint: Checkpoint, key: str) -> Tensor:
    shard, info = checkpoint.tensors()[key]
    descriptor = open_to_read(checkpoint.folder / shard)
    try:
        return read_tensor(descriptor, info)
    finally:
        os.close(descriptor)


def _dtype_of(config: Mapping[str, Any], others: Iterable[TensorInfo]) -> torch.dtype:
    """Dtype of a model: that of its config, or of the largest of its tensors that are not quantized."""
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), None)
    largest_first = sorted(others, key=lambda info: -info.nbytes)
    candidates = [found, *(info.torch_dtype for info in largest_first), torch.float16]
    return next(dtype for dtype in candidates if dtype in WEIGHT_DTYPES)


def _headers(checkpoint: Checkpoint, entries: Entries) -> dict[str, Header]:
    headers = {}
    for shard, header in checkpoint.shards.items():
        tensors = [(key, *entries[key]) for key in header.tensors if key in entries]
        if tensors:  # a shard may hold scales alone
            headers[shard] = plan_header(tensors, {**header.metadata, **MARK})
    return headers


def _other_files(checkpoint: Checkpoint, trained: Path, config_changes: bool) -> list[str]:
    """What is copied: all but the adapters, the manifest, and what is written anew."""
    root, inside = checkpoint.folder.resolve(), trained.resolve()
    within = "" if inside == root or root not in inside.parents else f"{inside.relative_to(root).as_posix()}/"
    dropped = {MANIFEST, CONFIG_NAME, INDEX, *(["config.json"] if config_changes else [])}
    return [
        name
        for name in checkpoint.others
        if name not in dropped
        and not name.startswith(f"{ADAPTER_FOLDER}/")
        and not (within and name.startswith(within))
    ]


def _texts(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    headers: Mapping[str, Header],
    dtype: torch.dtype | None,
    quantized: bool,
) -> dict[str, str]:
    """config.json without the quantization and with the new dtype, and the index."""
    texts = {}
    if quantized or dtype is not None:
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        texts["config.json"] = json.dumps(plain if dtype is None else _with_dtype(plain, dtype), indent=2) + "\n"
    if (checkpoint.folder / INDEX).is_file() and INDEX in checkpoint.others:
        infos = {key: (shard, info) for shard, header in headers.items() for key, info in header.tensors.items()}
        index = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
        metadata = index["metadata"] if isinstance(index["metadata"], dict) else {}
        metadata = {**metadata, "total_size": sum(info.nbytes for _, info in infos.values())}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(torch.Size(info.shape).numel() for _, info in infos.values())
        index = {"metadata": metadata, "weight_map": {key: infos[key][0] for key in sorted(infos)}}
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    return texts


def _with_dtype(record: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config whose parts all name this dtype."""
    name = str(dtype).removeprefix("torch.")
    parts = {key: _with_dtype(value, dtype) for key, value in record.items() if isinstance(value, dict)}
    return {**record, **parts, **{key: name for key in ("dtype", "torch_dtype") if key in record}}


def _notes(checkpoint: Checkpoint, adapter: AdapterFile) -> list[str]:
    named = adapter.config.get("base_model_name_or_path")
    if not named or same_folder(Path(named), checkpoint.folder):
        return []
    return [f"the config of {adapter.path.parent} names the base model {named}, and not {checkpoint.folder}"]
