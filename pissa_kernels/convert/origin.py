"""Where an adapter's base model is: the original one, by what lies around the initial adapter, and the residual one."""

from __future__ import annotations

import re
from pathlib import Path

from ..adapter.names import ADAPTER_FOLDER
from ..checkpoint.manifest import MANIFEST, Manifest
from ..files.folder import INDEX, SINGLE
from .adapter import AdapterFile

# A model's name on a hub; anything else is a path.
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def residual_folder(initial: AdapterFile) -> Path | None:
    """The residual checkpoint that the initial adapter belongs to: the folder that it is in, or the one around it."""
    folder = initial.path.resolve().parent
    return next((each for each in (folder, folder.parent) if _has_weights(each)), None)


def original_name(trained: AdapterFile, initial: AdapterFile) -> str | None:
    """What the base model of a plain LoRA is called: None where all that is known is the residual model.

    Raises:
        ValueError: there is a manifest, and it is damaged.
    """
    around = initial.path.resolve().parent.parent
    if (around / MANIFEST).is_file():
        return Manifest.read(around).source
    name: str | None = trained.config.get("base_model_name_or_path") or None
    return None if name is None or _is_residual(Path(name), around) else name


def is_hub_name(base: str) -> bool:
    """Whether a base model that is no folder here can be one on a hub."""
    return not Path(base).exists() and _HUB_NAME.fullmatch(base) is not None


def _is_residual(folder: Path, around: Path) -> bool:
    if not folder.is_dir():
        return False
    marked = (folder / ADAPTER_FOLDER).is_dir() or (folder / MANIFEST).is_file()
    return marked or (folder.resolve() == around and _has_weights(folder))


def _has_weights(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()
