"""The folder that a result becomes: what may be at its place, and what is never deleted for it."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from .places import Places


def destination(out: Path, *, may_be_mounted: bool = False) -> Path:
    """The folder that a path names, with links followed. It need not exist.

    A rename replaces neither a link nor a mount point, nor "." or "..".

    Args:
        out: the path.
        may_be_mounted: whether the caller can write into a mount point.

    Raises:
        FileExistsError: ``out`` is no folder, or a mount point.
        NotADirectoryError: a folder above it is a file, or a link that leads nowhere.
        PermissionError: the folder cannot be written in.
    """
    if out.is_symlink() and not out.exists():
        raise FileExistsError(
            f"{out} is a symbolic link to {os.readlink(out)}, which does not exist; make that folder, or choose another"
        )
    if os.path.lexists(out) and not out.is_dir():
        raise FileExistsError(f"{out} exists and is not a folder; choose another name")
    above = _nearest_above(out)
    if not above.is_dir():
        what = "a symbolic link that leads nowhere" if above.is_symlink() else "not a folder"
        raise NotADirectoryError(f"{out} cannot be made: {above} is {what}")
    if out.is_symlink() or out.name == "" or ".." in out.parts:
        out = out.resolve()
    mounted = Places().is_mount(out)
    if mounted and not may_be_mounted:
        raise FileExistsError(f"{out} is a mount point, which cannot be replaced; choose a folder in it")
    changed = out if mounted else _nearest_above(out)
    if not os.access(changed, os.W_OK | os.X_OK):
        what, other = ("replaced", "a folder in it") if out.exists() and not mounted else ("made", "another")
        raise PermissionError(f"{out} cannot be {what}: the folder {changed} cannot be written in; choose {other}")
    return out


def _nearest_above(path: Path) -> Path:
    """The nearest folder above a path that exists, or what is in its place. The root is above itself."""
    path = path.absolute()
    return next((above for above in path.parents if os.path.lexists(above)), path)


def check_deletable(folder: Path, files: Collection[str], maker: str, besides: Collection[str] = ()) -> None:
    """Refuse to delete a folder that holds more than a run has written.

    Args:
        folder: the folder.
        files: paths of the files that the run wrote, relative to it, with "/".
        maker: who wrote them, for the message.
        besides: entries of the folder that are not deleted.

    Raises:
        FileExistsError: the folder holds something else, or a mount point.
    """
    if mounts := Places().mounts_below(folder):
        raise FileExistsError(f"{folder} holds the mount point {mounts[0]}; unmount it, or choose another folder")
    if found := first_unlisted(folder, files, besides):
        raise FileExistsError(
            f"{folder} holds {found}, which {maker} has not written and which would be lost; move it away, or choose "
            "another folder"
        )


def first_unlisted(folder: Path, files: Collection[str], besides: Collection[str] = ()) -> str | None:
    """The first entry of a folder that is neither one of ``files`` nor a folder of them. Links are not followed."""

    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}

    def fail(error: OSError) -> None:
        raise error

    for path, below, names in os.walk(folder, onerror=fail):
        below[:] = sorted(name for name in below if Path(path) != folder or name not in besides)
        for name in sorted({*below, *names}):
            entry = Path(path, name)
            place = entry.relative_to(folder).as_posix()
            if place not in (folders if name in below and not entry.is_symlink() else files):
                return place
    return None
