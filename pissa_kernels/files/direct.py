"""A file that tensors are written into, past the system's cache where it lets one.

Through the cache, a core has to find pages for what is written and to copy it there, and a thread of the system brings
them to the disk: together at least as much work as to digest it. And a result of many gigabytes would drive its own
source out of memory.
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

# What a system answers that does not write past its cache, or not with blocks as small as these.
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


class Output:
    """A file that is there in its full size, for any number of threads.

    Attributes:
        descriptor: of the file through the cache, for reading and for what is small.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR)
        self._path = path
        self._refused = False
        self._opening = threading.Lock()
        self._opened: list[int | None] = []  # past the cache, once it was asked for

    def close(self) -> None:
        """Close the file; nothing may be under way."""
        for descriptor in (self.descriptor, *self._opened):
            if descriptor is not None:
                os.close(descriptor)

    def _direct(self) -> int | None:
        """The file past the cache: opened when it is first of use, as a checkpoint may have hundreds of files."""
        with self._opening:
            if not self._opened:
                self._opened.append(None)
                # other systems than Linux have no such flag, not every file system takes it, and where no more files
                # can be opened this one need not be
                with contextlib.suppress(AttributeError, OSError):
                    self._opened[0] = os.open(self._path, os.O_RDWR | os.O_DIRECT)
            return self._opened[0]

    def takes(self, data: memoryview, at: int) -> bool:
        """Whether whole blocks of this data go past the cache: in memory they lie as they will lie in the file."""
        if self._refused or len(data) < 2 * BLOCK:
            return False
        alike = (np.frombuffer(data, np.uint8).ctypes.data - at) % BLOCK == 0
        return bool(alike) and self._direct() is not None

    def write(self, data: memoryview, at: int) -> None:
        """Write all of the data, from a place in the file on.

        Raises:
            OSError: no space, for one.
        """
        first = last = at
        if self.takes(data, at):
            first, last = -(-at // BLOCK) * BLOCK, (at + len(data)) // BLOCK * BLOCK
            try:
                write_at(self._direct(), data[first - at : last - at], first)  # type: ignore[arg-type]
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._refused = True  # and is not asked again, be it that only the rest of an interrupted write was odd
                last = first = at
        # through the cache what shares its block with a neighbour, or everything
        write_at(self.descriptor, data[: first - at], at)
        write_at(self.descriptor, data[last - at :], last)
