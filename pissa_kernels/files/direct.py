"""Direct writes (O_DIRECT): tensors go to the disk without a copy in the page cache.

Writing through the page cache costs a core as much as hashing the data does: the kernel allocates pages, copies the
data into them, and flushes them from another thread. It also evicts the source checkpoint from the cache. On two cores,
``init`` of a 2.2 GB checkpoint takes 18 % less time with direct writes (docs/decisions).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path

import numpy as np

from .buffer import BLOCK
from .header import write_at
from .system import open_to_write

# Errors of a file system without O_DIRECT, or with larger blocks than BLOCK.
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)


class Output:
    """A file of known size that threads write tensors into.

    Args:
        path: an existing file of the final size.

    Attributes:
        descriptor: file descriptor through the page cache, for reads and small writes.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = open_to_write(path)
        self._path = path
        self._unsupported = False
        self._opening = threading.Lock()
        self._opened: list[int | None] = []  # the direct descriptor, once it was needed; None where there is none

    def close(self) -> None:
        """Close the file. No write may be in progress."""
        for descriptor in (self.descriptor, *self._opened):
            if descriptor is not None:
                os.close(descriptor)

    def _direct(self) -> int | None:
        """The direct descriptor. Opened on first use, because a checkpoint may have hundreds of files."""
        with self._opening:
            if not self._opened:
                self._opened.append(None)
                # AttributeError: no O_DIRECT on this system. OSError: not on this file system, or too many open files
                with contextlib.suppress(AttributeError, OSError):
                    self._opened[0] = open_to_write(self._path, os.O_DIRECT)
            return self._opened[0]

    def can_write_directly(self, data: memoryview, at: int) -> bool:
        """Whether whole blocks of ``data`` can bypass the page cache: aligned in memory as they are in the file."""
        if self._unsupported or len(data) < 2 * BLOCK:
            return False
        aligned = (np.frombuffer(data, np.uint8).ctypes.data - at) % BLOCK == 0
        return bool(aligned) and self._direct() is not None

    def write(self, data: memoryview, at: int) -> None:
        """Write all of ``data`` at offset ``at``: whole blocks directly where possible, the rest through the cache.

        Raises:
            OSError: the file system has no space, for example.
        """
        first = last = at
        if self.can_write_directly(data, at):
            first, last = -(-at // BLOCK) * BLOCK, (at + len(data)) // BLOCK * BLOCK
            try:
                write_at(self._direct(), data[first - at : last - at], first)  # type: ignore[arg-type]
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                # never tried again for this file, even if only the rest of an interrupted write was unaligned
                self._unsupported = True
                last = first = at
        # blocks that are shared with a neighboring tensor, or everything
        write_at(self.descriptor, data[: first - at], at)
        write_at(self.descriptor, data[last - at :], last)
