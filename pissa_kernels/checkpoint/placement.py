"""OUT, where the result of a run goes: what may be there before, and the moves that put the result there.

A finished folder is renamed to OUT. A mount point cannot be renamed, so a run builds its result inside it, in a hidden
folder, and moves the entries one by one. config.json moves first out of an old result and last out of a new one, so
that no loader accepts a folder that is moved in part. A killed run has left all entries on one side or the other. A
move changes the time of an entry, so the manifest moves after the files that it is compared with.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ..files.atomic import sha256_of_file
from ..files.destination import check_deletable
from ..files.header import has_hashes, read_header
from ..files.places import Places
from ..files.system import flush
from .manifest import MANIFEST, REPORT, REPORT_DIGEST, Manifest

CONFIG = "config.json"
# What an ext4 file system has at its root from the start.
OF_THE_FILE_SYSTEM = "lost+found"


class Placement:
    """The place of a result, and the folders that it is moved from.

    Args:
        out: folder of the result.

    Attributes:
        out: folder of the result.
        mounted: whether it is a mount point.
        folder: the hidden folder of the run: beside ``out``, or in it if it is a mount point.
        unplaced: where the run writes its result.
        complete: its name once every file is on the disk. It is moved to ``out``.
        replaced: what was at ``out``. It is deleted after the move.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.mounted = Places().is_mount(out)
        self.folder = (out if self.mounted else out.parent) / f".{out.name}.unfinished"
        self.unplaced, self.complete, self.replaced = (self.folder / name for name in ("out", "complete", "replaced"))
        self._besides = (self.folder.name, OF_THE_FILE_SYSTEM) if self.mounted else ()

    def check_folder(self) -> None:
        """Refuse a name of the hidden folder that leads elsewhere, and an ``out`` that another run would delete."""
        if unfinished := [part for part in self.out.resolve().parts if re.fullmatch(r"\..+\.unfinished", part)]:
            raise FileExistsError(
                f"{self.out}: {unfinished[0]} is named like the folder of an unfinished run; choose another"
            )
        if os.path.lexists(self.folder) and (self.folder.is_symlink() or not self.folder.is_dir()):
            what = "a symbolic link" if self.folder.is_symlink() else "a file"
            raise FileExistsError(f"{self.folder} is {what}, where a run makes a folder; move it away")
        if Places().is_mount(self.folder) or Places().mounts_below(self.folder):
            raise FileExistsError(f"{self.folder} is or holds a mount point; unmount it, or choose another OUT")

    def occupied(self) -> bool:
        """Whether there is anything at ``out`` but an empty folder."""
        return os.path.lexists(self.out) and (self.out.is_symlink() or not self.out.is_dir() or bool(self._entries()))

    def check(self, replace: bool) -> None:
        """Refuse an ``out`` that holds something, or with ``replace`` one that holds more than a result of ``init``."""
        if not self.occupied():
            return
        if not replace:
            raise FileExistsError(
                f"{self.out} exists and is not an empty folder; --force replaces it at the end, if init has made it"
            )
        if self.out.is_symlink() or not self.out.is_dir():
            raise FileExistsError(f"{self.out} is not a folder any more, and --force replaces nothing else; move it")
        check_result(self.out, self._besides)

    def set_aside(self) -> None:
        """Move what is at ``out`` to ``replaced``. The manifest goes last: what is left is a result of ``init``."""
        if not self.mounted:
            self.delete_replaced()  # by a killed run, after which another result has come to be at ``out``
            os.replace(self.out, self.replaced)
            return
        self.replaced.mkdir(exist_ok=True)
        for path in sorted(self._entries(), key=lambda path: (path.name == MANIFEST, path.name != CONFIG)):
            os.replace(path, self.replaced / path.name)

    def check_replaced(self) -> None:
        """Refuse to delete what is in ``replaced`` if it holds more than the result that was set aside."""
        if self.replaced.is_dir() and any(self.replaced.iterdir()):
            half = self.mounted and not (self.replaced / MANIFEST).exists()
            check_result(self.replaced, manifest_in=self.out if half else None)

    def delete_replaced(self) -> None:
        """Delete ``replaced``, its manifest last, so that a killed run leaves a folder that can be checked."""
        if self.replaced.exists():
            for path in sorted(self.replaced.iterdir(), key=lambda path: path.name == MANIFEST):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self.replaced.rmdir()

    def place(self) -> None:
        """Move what is complete to ``out``, or what a killed run has left of it.

        Raises:
            FileExistsError: something has come to be there.
        """
        self._move(self.complete)
        flush(self.out if self.mounted else self.out.parent)

    def recover(self) -> None:
        """Finish what a killed run has begun to place, or put back what it has set aside."""
        if not self.mounted and self.occupied():
            return
        if self.complete.exists():
            self.place()
        elif self.unplaced.exists() and self.replaced.exists():
            self._move(self.replaced)

    def _entries(self) -> list[Path]:
        return [path for path in self.out.iterdir() if path.name not in self._besides]

    def _move(self, source: Path) -> None:
        if not self.mounted:
            if os.name == "nt":
                with contextlib.suppress(OSError):
                    self.out.rmdir()  # Windows does not rename to an empty folder
            try:
                os.replace(source, self.out)  # rename(2) replaces an empty folder, and nothing else
            except OSError:
                if not os.path.lexists(self.out):
                    raise
                raise appeared(self.out) from None
            return
        for path in sorted(source.iterdir(), key=lambda path: (path.name == CONFIG, path.name == MANIFEST)):
            place = self.out / path.name
            if os.path.lexists(place):
                raise appeared(place)
            os.replace(path, place)
        source.rmdir()


def appeared(path: Path) -> FileExistsError:
    """The error for something that was not there when the run began."""
    return FileExistsError(f"{path} has come to exist during the run; move it away, then --resume finishes the run")


def is_result_of(out: Path, plan: object) -> bool:
    """Whether a folder holds the complete result of a plan."""
    return (out / MANIFEST).is_file() and bool(Manifest.read(out).plan == plan)


def check_result(folder: Path, besides: Collection[str] = (), manifest_in: Path | None = None) -> None:
    """Refuse to delete a folder that holds anything but a result of ``init``.

    The names of all files are compared with the manifest. A file is hashed only if it came to the folder after the
    manifest, which a run writes last: to hash a checkpoint takes minutes. Copies may keep the time of their original
    (``cp -p``, ``rsync -a``), but not the time at which the file was made or changed here.

    Args:
        folder: the folder.
        besides: entries that are not deleted.
        manifest_in: where its manifest is, if the folder holds a part of a result.

    Raises:
        FileExistsError: the folder holds something else, or has no valid manifest.
    """
    try:
        manifest = Manifest.read(manifest_in or folder)
    except (FileNotFoundError, ValueError) as error:
        found = sorted(path.name for path in folder.iterdir() if path.name not in besides)
        reason = str(error) if isinstance(error, ValueError) else f"it has no {MANIFEST}"
        raise FileExistsError(
            f"{folder} holds {found[0]}, and is not a result of init: {reason}; move it away, or choose another folder"
        ) from None
    check_deletable(folder, {*manifest.files, MANIFEST, REPORT, REPORT_DIGEST}, "init", besides)
    written = _changed((manifest_in or folder) / MANIFEST)
    for name, about in manifest.files.items():
        path = folder / name
        if path.is_file() and _changed(path) > written and not _is_as_written(path, about):
            raise FileExistsError(
                f"{folder} holds {name}, which has changed since init wrote it and which would be lost; move it away, "
                "or choose another folder"
            )


def _changed(path: Path) -> int:
    """When a file or its status was last changed, in ns. Windows has the time of its creation instead of the latter."""
    status = path.stat()
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _is_as_written(path: Path, about: object) -> bool:
    """Whether a file has the hashes of its entry in the manifest."""
    match about:
        case {"sha256": expected}:
            return sha256_of_file(path) == str(expected)
        case {"tensors": dict(hashes)}:
            with contextlib.suppress(ValueError), path.open("rb") as file:
                infos = read_header(path).tensors
                return infos.keys() == hashes.keys() and all(
                    has_hashes(file.fileno(), info, hashes[name]) for name, info in infos.items()
                )
    return False
