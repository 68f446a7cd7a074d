"""The initial factors beside a trained adapter: a loader subtracts them and gets the same residual without an SVD.

``pissa_initial.safetensors`` holds A₀ and B₀ of every layer under the keys that PEFT gives to A and B, the fingerprints
of W and W_res, and in its header the report and a digest of all of these.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapter.names import KEY_PREFIX, factor_key
from ...files.atomic import atomic_file
from ...report import REPORT_NAME, Report
from ..weights.record import InitRecord

INITIAL_NAME = "pissa_initial.safetensors"


def write(folder: Path, records: Mapping[str, InitRecord], embeddings: Collection[str] = ()) -> None:
    """Write the records of one adapter's layers and their report. Each file is written atomically.

    Args:
        folder: folder of the adapter.
        records: records by the layer's name in the base model.
        embeddings: names of the layers that are embeddings.
    """
    from safetensors.torch import save_file

    tensors = {
        key: getattr(record, field).contiguous()
        for name, record in records.items()
        for field, key in _keys(name, name in embeddings).items()
    }
    report = report_of(records)
    text = report.to_json()
    metadata = {"format": "pt", "pissa_kernels": text, "sha256": digest(text, tensors)}
    with atomic_file(folder / INITIAL_NAME) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    report.write(folder / REPORT_NAME)


def report_of(records: Mapping[str, InitRecord]) -> Report:
    """The report of one adapter's layers."""
    return Report(layers=[replace(record.report, name=name) for name, record in records.items()])


def read(path: Path, adapter: str) -> dict[str, InitRecord]:
    """The records in a file, by the layer's name.

    Args:
        path: the file.
        adapter: name of the adapter in the model that it is loaded into.

    Raises:
        ValueError: the file is damaged, or is not a file of initial factors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        text = metadata["pissa_kernels"]
        report = Report.from_dict(json.loads(text))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold the initial factors of a PiSSA adapter: {error}") from None
    if metadata.get("sha256") != digest(text, tensors):
        raise ValueError(f"{path} is damaged: its contents do not match the digest that was written with them")
    return {
        layer.name: InitRecord(
            adapter, report=layer, **{field: tensors[key] for field, key in _keys_in(tensors, layer.name).items()}
        )
        for layer in report.layers
    }


def find(source: str | os.PathLike[str], options: Mapping[str, Any], filename: str = INITIAL_NAME) -> Path | None:
    """Path of a file in an adapter's folder or repository, or None.

    Args:
        source: the ``model_id`` of PEFT's ``from_pretrained``: a folder, or the name of a repository on a hub.
        options: its keyword arguments; ``subfolder``, ``revision``, ``cache_dir`` and ``token`` are used.
        filename: name of the file.
    """
    subfolder = options.get("subfolder") or ""
    folder = Path(source) / subfolder
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    used = {key: options[key] for key in ("revision", "cache_dir", "token") if options.get(key) is not None}
    try:
        return Path(hf_hub_download(str(source), filename, subfolder=subfolder or None, **used))
    except (EntryNotFoundError, HFValidationError, OSError):
        # OSError: no network. PEFT then has the adapter itself in its cache, or raises an error of its own
        return None


def digest(report: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the report's JSON and of every tensor. Each tensor is read from the mapping once."""
    sha = hashlib.sha256(report.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _keys_in(tensors: Mapping[str, Tensor], name: str) -> dict[str, str]:
    """As :func:`_keys`, for a layer that is in a file."""
    as_embedding = _keys(name, embedding=True)
    return as_embedding if as_embedding["lora_A"] in tensors else _keys(name)


def _keys(name: str, embedding: bool = False) -> dict[str, str]:
    """Keys of a layer's tensors in the file, by the field of the record."""
    factors = {
        f"lora_{factor}": f"{KEY_PREFIX}{name}.lora_embedding_{factor}" if embedding else factor_key(name, factor)
        for factor in "AB"
    }
    return factors | {field: f"{KEY_PREFIX}{name}.{field}" for field in ("before", "after")}
