"""What systems do differently: reads and writes at an offset, reserved space, flushes, locks.

Linux has all of it. Where a system lacks a call, the next best thing is done: none of them changes the bytes that are
read or written.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Windows would translate line ends without it.
BINARY = getattr(os, "O_BINARY", 0)
# Errors of a file system on which space cannot be reserved.
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
# A file's offset is shared by all threads.
_at_offset = threading.Lock()


def open_to_read(path: Path) -> int:
    """A file descriptor to read a file with."""
    return os.open(path, os.O_RDONLY | BINARY)


def open_to_write(path: Path, flags: int = 0) -> int:
    """A file descriptor to read and write a file with.

    Args:
        path: the file.
        flags: further flags of ``os.open``.
    """
    return os.open(path, os.O_RDWR | BINARY | flags, 0o666)


def read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into ``buffer`` from ``offset`` of a file. Returns the number of bytes, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    with _at_offset, io.FileIO(descriptor, closefd=False) as file:
        file.seek(offset)
        return file.readinto(buffer) or 0


def write_some(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Write ``buffer`` at ``offset`` of a file. Returns the number of bytes that were written."""
    if hasattr(os, "pwritev"):
        return os.pwritev(descriptor, [buffer], offset)
    with _at_offset:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, buffer)


def reserve(descriptor: int, path: Path, size: int) -> None:
    """Give a file its size, and the space for it where the file system can reserve it. Contents are kept.

    Raises:
        OSError: there is no space (ENOSPC).
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    missing = size - os.fstat(descriptor).st_size
    if missing > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    if missing > 0:
        os.ftruncate(descriptor, size)


def will_need(descriptor: int, start: int, nbytes: int) -> None:
    """Start reading a part of a file into the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_WILLNEED)


def flush_contents(descriptor: int) -> None:
    """Flush a file's contents to the disk, without its times where the system can."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def flush(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk. Windows cannot flush a folder."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = open_to_write(path) if windows else open_to_read(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path) -> int | None:
    """Take the lock of a folder, which ends with the process.

    Returns:
        A descriptor of the folder; closing it gives the lock back. None where the system cannot lock a folder.

    Raises:
        BlockingIOError: another process has the lock.
    """
    if fcntl is None:
        return None  # type: ignore[unreachable]
    descriptor = open_to_read(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system without locks
    return descriptor
