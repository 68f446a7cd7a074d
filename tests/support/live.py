"""The tensor memory that exists while code runs, and its peak."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pissa_kernels.ops import batched_reference, dispatch

OPERATIONS = ("product", "split", "inverse_cholesky", "eigh", "sum_of_squares", "subtract_lowrank_")


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that follows the storages of all tensors that this thread makes.

    Args:
        existing: tensors that are counted as 0 bytes while they exist, and as negative when they are freed.

    Attributes:
        now: bytes of the storages that exist.
        peak: the largest value of ``now``.
    """

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: set[int] = set()
        self.now = 0
        self.follow(existing)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.follow(results)
        return results

    def follow(self, results: Any) -> None:
        """Count the storages of the tensors in a tree, if they are new."""
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in self._known:
                storage = leaf.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                self.peak = max(getattr(self, "peak", 0), self.now)
                weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextlib.contextmanager
def live_bytes(*existing: Tensor) -> Iterator[LiveBytes]:
    """:class:`LiveBytes` of code whose operations on batches are kernels, which allocate their results only."""
    live = LiveBytes(*existing)

    def kernel(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():  # type: ignore[no-untyped-call]
                results = getattr(batched_reference, name)(*args, **kwargs)
            live.follow(results)
            return results

        return call

    body = SimpleNamespace(**{name: kernel(name) for name in OPERATIONS})
    with mock.patch.object(dispatch, "bodies", return_value=body), live:
        yield live
