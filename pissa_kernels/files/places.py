"""What identifies a folder, whichever path leads to it: its real path, its inode, and its place in a file system."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

# A real path, a device and an inode, or a device and a path inside its file system.
Key: TypeAlias = "Path | tuple[int, int] | tuple[str, Path]"


class _Mount(NamedTuple):
    """A mount: the mount point, the device, and the folder of the device's file system that is mounted there."""

    point: Path
    device: str
    root: Path


class Places:
    """The keys of paths. Two paths lead to the same folder if they have a key in common.

    Inodes find case-insensitive names, and most bind mounts (``mount --bind``). A path through a bind mount of a folder
    does not pass the folders above that one; its place in the file system does. Linux lists the mounts.
    """

    def __init__(self) -> None:
        mounts: dict[str, _Mount] = {}
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
                # proc(5); spaces and backslashes are octal numbers. A mount hides an earlier one on the same point.
                fields = [re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field) for field in line.split()]
                mounts[fields[4]] = _Mount(Path(fields[4]), fields[2], Path(fields[3]))
        self._innermost_first = sorted(mounts.values(), key=lambda mount: -len(mount.point.parts))
        # Where only whole file systems are mounted, inodes suffice. Linux lists all NFS mounts as whole file systems,
        # also two different folders of one, so that their places cannot be compared.
        self._in_parts = {mount.device for mount in mounts.values() if mount.root != Path("/")}

    def of(self, path: Path) -> list[Key]:
        """The keys of a path. It need not exist."""
        real = path.resolve()
        keys: list[Key] = [real]
        if place := self._in_file_system(real):
            keys.append(place)
        with contextlib.suppress(OSError):
            status = os.stat(real)
            keys.append((status.st_dev, status.st_ino))
        return keys

    def of_lineage(self, path: Path) -> Iterator[Key]:
        """The keys of a path, and of all folders above it."""
        real = path.resolve()
        for folder in (real, *real.parents):
            yield from self.of(folder)
        if place := self._in_file_system(real):
            yield from ((place[0], folder) for folder in place[1].parents)

    def mounts_below(self, path: Path) -> list[Path]:
        """The mount points below a folder. To delete the folder would delete the files that are mounted there."""
        real = path.resolve()
        return [mount.point for mount in self._innermost_first if real in mount.point.parents]

    def is_mount(self, path: Path) -> bool:
        """Whether a path is a mount point, also that of a folder of the same file system (``mount --bind``)."""
        real = path.resolve()
        return os.path.ismount(real) or any(mount.point == real for mount in self._innermost_first)

    def _in_file_system(self, real: Path) -> tuple[str, Path] | None:
        lineage = {real, *real.parents}
        mount = next((mount for mount in self._innermost_first if mount.point in lineage), None)
        if mount is None or mount.device not in self._in_parts:
            return None
        return mount.device, mount.root / real.relative_to(mount.point)


def links_to(path: Path) -> Iterator[Path]:
    """The symbolic links on the way to an absolute path that exists, each in its real folder."""
    for part in (path, *path.parents):
        link = part.parent.resolve() / part.name
        if link.is_symlink():
            yield link
            yield from links_to(link.parent / os.readlink(link))
