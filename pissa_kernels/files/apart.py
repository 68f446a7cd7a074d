"""What is written lies apart from what is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .places import Key, Places, links_to
from .walk import walk


def check_apart(written: Sequence[Path], read: Sequence[Path]) -> None:
    """Refuse to write where something is read, before anything is touched.

    Paths are compared as :class:`Places` identifies them, so that links and bind mounts do not hide that they meet. The
    links themselves count too: those on the way to a path of ``read``, and those inside it, as in the hub's cache.

    Args:
        written: folders that a run creates, fills or replaces; they need not exist.
        read: files and folders that it reads. Paths that do not exist are ignored.

    Raises:
        FileExistsError: a path of ``written`` lies in, under or above a path of ``read``.
    """
    places = Places()
    folders: dict[Key, Path] = {}
    held: dict[Key, Path] = {}  # what is read, and all folders that hold it
    for path in _paths_read(read):
        if path.is_dir():
            folders = dict.fromkeys(places.of(path), path) | folders
        for place in (path, *(link.parent for link in links_to(path))):
            held = dict.fromkeys(places.of_lineage(place), path) | held
    for out in written:
        path = out.absolute()
        if found := _look_up(places.of(path), folders):
            raise FileExistsError(f"{out} is {found}, which is read and must not be written to")
        for place in (path, path.parent) if path.is_symlink() else (path,):
            if found := _look_up(places.of_lineage(place), folders):
                raise FileExistsError(f"{out} is in {found}, which is read and must not be written to")
        for place in (path, *places.mounts_below(path)):
            if found := _look_up(places.of(place), held):
                raise FileExistsError(f"{out} holds {found}, which is read; choose another folder")


def _paths_read(read: Sequence[Path]) -> Iterator[Path]:
    """The paths that are read: those given, then the folders and symbolic links inside them."""
    sources = [source.absolute() for source in read if source.exists()]
    yield from sources
    for source in sources:
        for path, folders, files in walk(source):
            yield from (path / name for name in folders)
            yield from (link for name in files if (link := path / name).is_symlink() and os.path.exists(link))


def _look_up(keys: Iterable[Key], paths: Mapping[Key, Path]) -> Path | None:
    return next((paths[key] for key in keys if key in paths), None)
