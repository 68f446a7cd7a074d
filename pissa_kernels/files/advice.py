"""What to do with a folder that is no checkpoint in safetensors: which folder to give, or how to make one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from .walk import obstacle, printable

WEIGHTS = re.compile(
    r"\.(bin|pt|pth|ckpt|ot|h5|keras|msgpack|gguf|ggml|onnx|onnx_data|onnx\.data|safetensors|npz|tflite|mlmodel|pte"
    r"|engine|distcp|nemo|pdparams|llamafile)(_\d+)?$"
)
_VARIANT = "load the model with from_pretrained(…, variant={variant!r}) and save it"
# By pattern of a file's name: what to say of a folder that has no other weights. The first that is found decides.
_FORMATS = (
    (r"pytorch_model(-\d+-of-\d+)?\.bin", "load the model with transformers and save it as safetensors"),
    (r"model\.(?P<variant>\w+)(-\d+-of-\d+)?\.safetensors", _VARIANT),
    (r"pytorch_model\.(?P<variant>\w+)(-\d+-of-\d+)?\.bin", _VARIANT),
    (r"model-\d+-of-\d+\.safetensors", "a shard without model.safetensors.index.json; download the index too"),
    (r"adapter_model\..*", "the weights of an adapter; give the folder of the model that it was trained on"),
    (r"diffusion_pytorch_model.*", "of a model of diffusers, which transformers does not load"),
    (r"consolidated.*", "in a format that transformers does not load; download the model in transformers' format"),
    (r".*\.gguf", "load the model with from_pretrained(…, gguf_file={name!r}) and the package gguf, and save it"),
    (r".*\.(h5|keras|msgpack)", "of TensorFlow or Flax, which transformers 5 does not load; get the PyTorch weights"),
    (r".*\.safetensors", "transformers looks for model.safetensors; rename the file if it holds the whole model"),
)


def without_config(folder: Path) -> str:
    """Message on a folder without config.json."""
    said = f"{folder} is not a model folder: it has no config.json"
    if (folder / "model_index.json").is_file():
        usable = [path.name for path in _model_folders(folder) if read_json(path / "config.json").get("architectures")]
        return (
            f"{folder} is a pipeline of diffusers (model_index.json); init takes a single model of transformers"
            + _one_of(folder, usable)
        )
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return f"{said}, only an adapter; give the folder of the model that it was trained on" + (
            f", {base}" if isinstance(base, str) and base else ""
        )
    transformers = (name for name in module_folders(folder) if (folder / name / "config.json").is_file())
    if first := next((name for name in transformers if _weights_in(folder / name)), None):
        return f"{said}; modules.json puts the transformer in a folder of its own: give {folder / first}"
    snapshots = sorted((folder / "snapshots").glob("*")) if folder.name.startswith("models--") else []
    if snapshots:
        return f"{said}; it is a model in the hub's cache: give {snapshots[-1]}"
    if usable := [path.name for path in _model_folders(folder)]:
        return said + _one_of(folder, usable)
    if names := _weights_in(folder):
        return f"{said}, only {_advice(names)}"
    return said


def without_safetensors(folder: Path) -> str:
    """Message on a folder with a config.json and without model.safetensors or its index."""
    said = f"{folder} has neither model.safetensors nor model.safetensors.index.json"
    kind = read_json(folder / "config.json").get("_class_name")
    if isinstance(kind, str):
        return (
            f"{folder} holds a {kind} of diffusers, which transformers does not load; init takes transformers' models"
        )
    if names := _weights_in(folder):
        return f"{said}, only {_advice(names)}"
    usable = [path.name for path in _model_folders(folder) if _weights_in(path)]
    return said + _one_of(folder, usable) if usable else f"{said}; download the model's weights too"


def module_folders(folder: Path) -> list[str]:
    """Folders of the modules that sentence-transformers' ``modules.json`` lists, in its order, but for the root.

    Raises:
        ValueError: a module lies outside of the folder.
    """
    modules = read_json(folder / "modules.json", list) if (folder / "modules.json").is_file() else []
    found = []
    for module in modules:
        path = module.get("path") if isinstance(module, dict) else None
        if not isinstance(path, str):
            continue
        parts = PurePosixPath(path.replace("\\", "/")).parts
        if ".." in parts or path.startswith(("/", "\\")):
            raise ValueError(f"{folder / 'modules.json'} lists {path!r}, which is outside of its folder")
        if parts:
            found.append("/".join(parts))
    return found


def _weights_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if WEIGHTS.search(path.name) and not path.is_dir())


def _advice(names: Iterable[str]) -> str:
    for pattern, advice in _FORMATS:
        for name in names:
            if match := re.fullmatch(pattern, name):
                return f"{printable(name)}: {advice.format(name=name, **match.groupdict())}"
    name = next(iter(names))
    return f"{printable(name)}, which transformers does not load: download the model's PyTorch weights"


def _model_folders(folder: Path) -> list[Path]:
    """Folders directly inside a folder that have a config.json."""
    return sorted(path.parent for path in folder.glob("*/config.json") if path.is_file())


def _one_of(folder: Path, names: list[str]) -> str:
    if not names:
        return ""
    more = f", or {', '.join(names[1:4])} beside it" if names[1:] else ""
    return f"; give the folder of its model, {folder / names[0]}{more}"


def read_json(path: Path, kind: type = dict) -> Any:
    """The contents of a JSON file; empty where it is none, or of another kind."""
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if obstacle(path) is None else None
    except (OSError, ValueError, RecursionError):
        record = None
    return record if isinstance(record, kind) else kind()
