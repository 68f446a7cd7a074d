"""Checkpoint folders as transformers saves them: a config, safetensors in one file or in shards, and other files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .header import Header, TensorInfo, read_header, sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files that may hold the same weights in another format, or an optimizer's state. A copy of them would not be residual.
OTHER_WEIGHTS = {
    *(".bin", ".pt", ".pth", ".ckpt", ".ot", ".h5", ".msgpack"),
    *(".gguf", ".onnx", ".onnx_data", ".safetensors"),
}
IGNORED_FOLDERS = {".git", ".cache", "__pycache__"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        folder: path of the folder.
        shards: header of each safetensors file, by its name.
        others: paths of files without weights, relative to the folder, with "/".
        left_out: paths of files that hold weights in other formats, or that the index does not list.
    """

    folder: Path
    shards: Mapping[str, Header]
    others: tuple[str, ...]
    left_out: tuple[str, ...]

    def tensors(self) -> dict[str, tuple[str, TensorInfo]]:
        """Shard and place of every tensor, by name."""
        return {name: (shard, info) for shard, header in self.shards.items() for name, info in header.tensors.items()}

    def fingerprint(self) -> dict[str, Any]:
        """Size and modification time of every file, and the hash of every shard's header, to detect changes."""
        found: dict[str, Any] = {}
        for name in (*self.shards, *self.others):
            status = (self.folder / name).stat()
            found[name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
            if name in self.shards:
                found[name]["header"] = sha256(self.shards[name].encoded)
        return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read everything of a checkpoint folder but its tensors.

    Raises:
        FileNotFoundError, NotADirectoryError: no folder, config or safetensors; a shard is missing.
        ValueError: a file is damaged, or the index does not match the shards.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    if (folder / SINGLE).is_file():
        shards = {SINGLE: read_header(folder / SINGLE)}
    elif (folder / INDEX).is_file():
        shards = _indexed(folder)
    else:
        other = next((path.name for path in sorted(folder.iterdir()) if path.suffix in OTHER_WEIGHTS), None)
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {INDEX}"
            + (f", only {other}: load the model with transformers and save it as safetensors" if other else "")
        )
    weights = {*shards, SINGLE}
    others: list[str] = []
    left_out: list[str] = []
    for name in files_of(folder):
        if name in weights:
            continue
        (left_out if Path(name).suffix in OTHER_WEIGHTS else others).append(name)
    if SINGLE in shards:  # transformers loads the single file and ignores an index beside it
        others = [name for name in others if name != INDEX]
    return Checkpoint(folder, shards, tuple(others), tuple(left_out))


def files_of(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, with "/", sorted. Symbolic links are followed."""
    found = []
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(set(folders) - IGNORED_FOLDERS)
        found += [Path(path, name).relative_to(folder).as_posix() for name in files]
    return sorted(found)


def _indexed(folder: Path) -> dict[str, Header]:
    path = folder / INDEX
    try:
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of shards: {type(error).__name__} {error}") from None
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise ValueError(f"{path} lists {name!r}, which is not a safetensors file in its folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path} lists {name}, which is missing")
    shards = {name: read_header(folder / name) for name in names}
    found: dict[str, str] = {}
    for name, header in shards.items():
        for tensor in header.tensors:
            if tensor in found:
                raise ValueError(f"{folder}: tensor {tensor!r} is in {found[tensor]} and in {name}")
            found[tensor] = name
    for tensor in sorted(listed.keys() | found.keys()):
        shard, actual = listed.get(tensor), found.get(tensor)
        if shard is None:
            raise ValueError(f"{path} does not list tensor {tensor!r}, which is in {actual}")
        if shard != actual:
            where = f"but it is in {actual}" if actual else "which does not hold it"
            raise ValueError(f"{path} lists tensor {tensor!r} in {shard}, {where}")
    return shards
