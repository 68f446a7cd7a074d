"""The models around an adapter: name of the original model, and folder of the residual checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..adapter.names import ADAPTER_FOLDER
from ..checkpoint.manifest import MANIFEST, Manifest
from ..files.folder import INDEX, SINGLE
from .adapter import AdapterFile

# "name" or "organization/name"; everything else is a path.
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def residual_folder(initial: AdapterFile) -> Path | None:
    """Folder of the residual checkpoint of an initial adapter: the adapter's folder or its parent, None if neither."""
    folder = initial.path.resolve().parent
    return next((path for path in (folder, folder.parent) if _has_weights(path)), None)


def original_name(trained: AdapterFile, initial: AdapterFile) -> str | None:
    """Name or folder of the original model; None if only the residual one is known.

    The manifest of the residual checkpoint comes first, then the trained adapter's config.

    Raises:
        ValueError: the manifest is damaged.
    """
    parent = initial.path.resolve().parent.parent
    if (parent / MANIFEST).is_file():
        return Manifest.read(parent).source
    name: str | None = trained.config.get("base_model_name_or_path") or None
    return None if name is None or _is_residual(Path(name), parent) else name


def is_hub_name(base: str | os.PathLike[str]) -> bool:
    """Whether a base model is not a folder here but may be the name of one on a hub.

    Args:
        base: a path or a name. A name has at most one slash, and there is no folder that it would lie in as a path.

    Raises:
        FileNotFoundError: it is a path, and nothing is there.
    """
    path, name = Path(base), os.fspath(base)
    if path.exists():
        return False
    in_folder = len(path.parts) > 1 and path.parent.is_dir()
    if isinstance(base, str) and _HUB_NAME.fullmatch(name) and not in_folder:
        return True
    raise FileNotFoundError(
        f"the base model {name} does not exist" + (f", and {path.parent} does" if in_folder else "")
    )


def _is_residual(folder: Path, parent: Path) -> bool:
    if not folder.is_dir():
        return False
    marked = (folder / ADAPTER_FOLDER).is_dir() or (folder / MANIFEST).is_file()
    return marked or (folder.resolve() == parent and _has_weights(folder))


def _has_weights(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()
