"""The initial factors beside a trained adapter, so that loading it takes the same residual with no SVD.

``pissa_initial.safetensors`` holds A₀ and B₀ of every layer under the keys that PEFT gives to A and B, the elements
that W and W_res are recognised by, and in its header the report and a digest of all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.names import KEY_PREFIX
from ..files.atomic import atomic_file
from ..report import REPORT_NAME, Report
from .record import InitRecord

INITIAL_NAME = "pissa_initial.safetensors"
_TENSORS = ("lora_A", "lora_B", "before", "after")


def write(folder: Path, initials: Mapping[str, InitRecord]) -> None:
    """Write the records of one adapter's layers, and their report; each file appears whole or not at all.

    Args:
        folder: the adapter's.
        initials: by the layer's name in the base model.
    """
    from safetensors.torch import save_file

    tensors = {
        _key(name, part): getattr(initial, part).contiguous() for name, initial in initials.items() for part in _TENSORS
    }
    report = report_of(initials)
    record = report.to_json()
    metadata = {"format": "pt", "pissa_kernels": record, "sha256": digest(record, tensors)}
    with atomic_file(folder / INITIAL_NAME) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    report.write(folder / REPORT_NAME)


def report_of(initials: Mapping[str, InitRecord]) -> Report:
    """What was done to one adapter's layers."""
    return Report(layers=[replace(initial.report, name=name) for name, initial in initials.items()])


def read(path: Path, adapter: str) -> dict[str, InitRecord]:
    """The records in a file, by the layer's name.

    Args:
        path: the file.
        adapter: what the adapter is called in the model that it is loaded into.

    Raises:
        ValueError: the file is damaged, or not of this kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        record = metadata["pissa_kernels"]
        report = Report.from_dict(json.loads(record))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold the initial factors of a PiSSA adapter: {error}") from None
    if metadata.get("sha256") != digest(record, tensors):
        raise ValueError(f"{path} is damaged: its contents do not match the digest that was written with them")
    return {
        layer.name: InitRecord(adapter, report=layer, **{part: tensors[_key(layer.name, part)] for part in _TENSORS})
        for layer in report.layers
    }


def find(source: str | os.PathLike[str], options: Mapping[str, Any], filename: str = INITIAL_NAME) -> Path | None:
    """Where an adapter's folder or repository has this file, or None.

    Args:
        source: what PEFT's ``from_pretrained`` was given: a folder, or a repository's name on a hub.
        options: its other arguments; ``subfolder``, ``revision``, ``cache_dir`` and ``token`` are used.
        filename: of the file.
    """
    subfolder = options.get("subfolder") or ""
    folder = Path(source) / subfolder
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    wanted = {key: options[key] for key in ("revision", "cache_dir", "token") if options.get(key) is not None}
    try:
        return Path(hf_hub_download(str(source), filename, subfolder=subfolder or None, **wanted))
    except (EntryNotFoundError, HFValidationError, OSError):
        # OSError: no network. PEFT has the adapter itself in its cache then, or says that it cannot be reached
        return None


def _key(name: str, part: str) -> str:
    return f"{KEY_PREFIX}{name}.{part}" + (".weight" if part.startswith("lora_") else "")


def digest(record: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the report's JSON and of every tensor, each of which is asked for once."""
    sha = hashlib.sha256(record.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()
