"""Text files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_target(path: Path) -> None:
    """Refuse a path that no file can be written to, before any work is done for it.

    Raises:
        FileExistsError: it is a folder.
        FileNotFoundError: its folder does not exist.
    """
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; what is written there must have a file's name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; whoever reads ``path`` meanwhile finds the old file or the new one, never a part.

    Raises:
        OSError: it cannot be written; a file that was there is untouched then.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o644)  # mkstemp's file is its owner's only
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
