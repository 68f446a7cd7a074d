"""The files below a folder, whatever is among them: links in circles, broken links, pipes, names in odd bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

IGNORED_FOLDERS = {".git", ".cache", "__pycache__"}
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As ``os.walk`` with links followed, in order, but a link to a folder around it counts as a file.

    Args:
        folder: where to begin.

    Yields:
        A folder, the names of its folders without :data:`IGNORED_FOLDERS`, and the names of everything else in it.
    """
    around: dict[str, tuple[tuple[int, int], ...]] = {str(folder): (_identity(folder),)}
    for path, folders, files in os.walk(folder, followlinks=True):
        above = around.pop(path, ())
        folders[:] = sorted(set(folders) - IGNORED_FOLDERS)
        for name in list(folders):
            identity = _identity(Path(path, name))
            if identity in above:
                folders.remove(name)
                files.append(name)
            else:
                around[os.path.join(path, name)] = (*above, identity)
        yield Path(path), folders, sorted(files)


def files_of(folder: Path) -> list[str]:
    """Paths of everything but folders below a folder, relative to it, with "/", sorted. Symbolic links are followed."""
    return sorted((path / name).relative_to(folder).as_posix() for path, _, files in walk(folder) for name in files)


def obstacle(path: Path) -> str | None:
    """What keeps a path from being read as a file; None for a file that can be read. Nothing is opened."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            return f"a link to {printable(os.readlink(path))}, which does not exist"
        return f"not readable ({error.strerror})"
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            return kind if kind != "a folder" or not path.is_symlink() else "a link to a folder around it"
    return None if os.access(path, os.R_OK) else "not readable (permission denied)"


def printable(name: str) -> str:
    """A name for messages: escaped where it holds line ends or bytes that are no text."""
    return name if name.isprintable() else ascii(name)


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # deleted meanwhile
        return (-1, -1)
    return status.st_dev, status.st_ino
