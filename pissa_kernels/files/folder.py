"""Checkpoint folders as transformers saves them: a config, safetensors in one file or in shards, and other files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .advice import WEIGHTS, module_folders, read_json, without_config, without_safetensors
from .header import Header, TensorInfo, read_header, sha256
from .recognize import check_readable, check_text, is_lfs_pointer
from .walk import files_of, obstacle

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# An index of weights in another format, or of a variant.
OTHER_INDEX = re.compile(r"\.(bin|h5|msgpack|safetensors)\.index(\.\w+)?\.json$")
# Files that a model does not work without; a Git LFS pointer in the place of a picture is copied as it is.
NEEDED = {".json", ".jsonl", ".model", ".txt", ".tiktoken", ".spm", ".vocab", ".bpe", ".jinja", ".py"}
# Why a file is left out.
OTHER_FORMAT = "they hold weights that would not be residuals"
NOT_IN_USE = "they list weights that are left out"
NOT_A_FILE = "they are not files that can be read"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        folder: path of the folder.
        shards: header of each safetensors file, by its name.
        others: paths of files without weights, relative to the folder, with "/".
        left_out: paths of all others, with the reason: weights in other formats or that the index does not list, and
            what is not a file.
    """

    folder: Path
    shards: Mapping[str, Header]
    others: tuple[str, ...]
    left_out: Mapping[str, str]

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
        OSError: a file cannot be read, or is not a file.
        ValueError: a file is damaged, a Git LFS pointer or an error page, or the index does not match the shards.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    if not os.path.lexists(folder / "config.json"):
        raise FileNotFoundError(without_config(folder))
    check_text(folder / "config.json")
    named = read_json(folder / "config.json").get("transformers_weights")
    if named and named not in (SINGLE, INDEX):
        raise ValueError(
            f"{folder / 'config.json'} names {named!r} for the weights (transformers_weights); rename that file "
            f"{SINGLE} and delete the entry"
        )
    if os.path.lexists(folder / SINGLE):
        shards = {SINGLE: read_header(folder / SINGLE)}
    elif os.path.lexists(folder / INDEX):
        shards = _indexed(folder)
    else:
        raise FileNotFoundError(without_safetensors(folder))
    others, left_out = _other_files(folder, shards)
    return Checkpoint(folder, shards, tuple(others), left_out)


def _other_files(folder: Path, shards: Mapping[str, Header]) -> tuple[list[str], dict[str, str]]:
    """The files to copy, and by name of each of the rest why it is left out."""
    modules = tuple(f"{module}/" for module in module_folders(folder))
    others: list[str] = []
    left_out: dict[str, str] = {}
    for name in files_of(folder):
        path = folder / name
        is_module = name.startswith(modules)  # weights of such a module are a part of the model that has no adapter
        if name in shards:
            continue
        if WEIGHTS.search(name) and not is_module:
            left_out[name] = OTHER_FORMAT
        elif OTHER_INDEX.search(name) and not is_module and (name != INDEX or SINGLE in shards):
            left_out[name] = NOT_IN_USE
        elif path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{path} is {obstacle(path)}; complete the download, or delete the link")
        elif not path.is_file():
            left_out[name] = NOT_A_FILE
        else:
            check_readable(path)
            if (is_module or path.suffix in NEEDED) and is_lfs_pointer(path):
                check_text(path)
            others.append(name)
    return others, left_out


def _indexed(folder: Path) -> dict[str, Header]:
    path = folder / INDEX
    check_text(path)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = index["weight_map"]
        index["metadata"]  # transformers loads no index without it
        listed = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of shards: {type(error).__name__} {error}") from None
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise ValueError(f"{path} lists {name!r}, which is not a safetensors file in its folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{path} lists {missing[0]}, which is missing, as are {len(missing)} of {len(names)} shards; complete the "
            "download"
        )
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
