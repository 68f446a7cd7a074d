"""Memory for one tensor at a time, which each thread keeps for the next one."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# What goes past the system's cache begins and ends with these, in memory and in the file: few disks have larger blocks
# than 4096 bytes, and the cache has whole pages.
BLOCK = max(4096, mmap.PAGESIZE)
# What memory in large pages is a multiple of: else the system lets it begin anywhere, and its ends are small pages.
LARGE_PAGE = 2 << 20


class Buffer(threading.local):
    """Each thread's own: grown to its largest tensor, released with the thread.

    In large pages, where the system has them. A weight is read some forty times, and to look up its pages of 4 KiB each
    time takes a product with 23 MB 5 % longer. Fresh large pages would be zeroed for every tensor.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], dtype: torch.dtype, at: int = 0) -> Tensor:
        """An uninitialised CPU tensor; with the same thread's next call it is no longer the caller's.

        Args:
            shape, dtype: of the tensor.
            at: where it begins in a file. In memory it is as far from a block's beginning as there, unless the dtype's
                elements may not begin there, or the system is none with large pages.

        Raises:
            MemoryError: the system does not have as much.
        """
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        place = at % BLOCK if at % dtype.itemsize == 0 else 0
        if place + nbytes > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # releases the old before the new is there
            self._memory = _in_large_pages(nbytes + BLOCK)
        return self._memory[place : place + nbytes].view(dtype).view(torch.Size(shape))


def _in_large_pages(nbytes: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # another system than Linux
        return torch.empty(nbytes, dtype=torch.uint8)
    if nbytes >= LARGE_PAGE:
        nbytes = -(-nbytes // LARGE_PAGE) * LARGE_PAGE
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes: {error}") from None
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


# One for all who do one weight after another: a thread goes over from the one to the other.
weights = Buffer()
