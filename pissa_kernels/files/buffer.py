"""Memory for one tensor at a time that a thread reuses for the next."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# Alignment of direct writes, in memory and in the file. Few disks have sectors larger than 4096 bytes, and the page
# cache works in whole pages.
BLOCK = max(4096, mmap.PAGESIZE)
# Size of a transparent huge page on x86-64. A mapping of another size starts at any 4 KiB page, with small pages at its
# ends.
LARGE_PAGE = 2 << 20


class Buffer(threading.local):
    """One block of memory for each thread: grown to the thread's largest tensor, freed when the thread ends.

    The memory is in huge pages where the system has them. A weight is read some forty times, and with pages of 4 KiB
    the address translation makes a product with a weight of 23 MB 5 % slower. Newly mapped huge pages would be zeroed
    for every tensor.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], dtype: torch.dtype, at: int = 0) -> Tensor:
        """An uninitialized CPU tensor, valid until the thread's next call.

        Args:
            shape, dtype: of the tensor.
            at: its offset in a file. The tensor starts at the same offset modulo :data:`BLOCK` in memory, as a direct
                write needs it, unless that is no multiple of the dtype's size or the system has no huge pages.

        Raises:
            MemoryError: the system is out of memory.
        """
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        place = at % BLOCK if at % dtype.itemsize == 0 else 0
        if place + nbytes > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old block before the new one is mapped
            self._memory = _huge_pages(nbytes + BLOCK)
        return self._memory[place : place + nbytes].view(dtype).view(torch.Size(shape))


def _huge_pages(nbytes: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(nbytes, dtype=torch.uint8)
    if nbytes >= LARGE_PAGE:
        nbytes = -(-nbytes // LARGE_PAGE) * LARGE_PAGE
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes: {error}") from None
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


# Shared by all workers of a process, one block for each thread.
weights = Buffer()
