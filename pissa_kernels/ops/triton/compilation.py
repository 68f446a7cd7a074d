"""Launches of Triton's kernels, and their compilation ahead of the first launch, in threads.

A kernel takes Triton 1 to 2 s to compile, and the operations of a decomposition have some twenty variants. A dry run
collects them: torch's operations run, and kernels only leave their arguments. The compiled kernels are in Triton's
cache on disk as well, where later processes find them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .pieces import INTERPRETED

Grid = tuple[int, ...]
# Compilations that the dry run of this thread has collected, by what Triton specializes a kernel for.
_collected: ContextVar[dict[Any, Callable[[], object]] | None] = ContextVar("pissa_kernels_collected", default=None)


def launch(kernel: Any, grid: Grid, *args: Any, **options: Any) -> Any:
    """Launch a kernel, or in a dry run collect it. The compiled kernel where there is one."""
    collected = _collected.get()
    if collected is None:
        return kernel[grid](*args, **options)
    variant = (id(kernel), *map(_specialization, args), *sorted((name, str(value)) for name, value in options.items()))
    collected.setdefault(variant, partial(kernel.warmup, *args, grid=grid, **options))
    return None


def _specialization(argument: Any) -> Any:
    """What Triton specializes a kernel for in an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return None if argument is None else type(argument)


def compile_ahead(dry_run: Callable[[], object], device: torch.device) -> None:
    """Compile every kernel that a function launches on a device; it runs without them."""
    if INTERPRETED:
        return
    found: dict[Any, Callable[[], object]] = {}
    token = _collected.set(found)
    try:
        dry_run()
    finally:
        _collected.reset(token)

    def compiled(variant: Callable[[], Any]) -> None:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            variant()[(1, 1, 1)]  # builds the launcher and loads the kernel, which the first launch does otherwise

    with ThreadPoolExecutor(max(1, min(len(found), os.cpu_count() or 1)), "pissa_kernels-compile") as pool:
        list(pool.map(compiled, found.values()))


class Repeated:
    """A kernel for many launches with one grid, that differ in the values of tensors and unspecialized integers.

    The compiled kernel is kept after the first launch: looking it up takes Triton most of the time of a launch.

    Args:
        kernel: Triton function, whose last parameters are ``constants``.
        grid: programs.
        constants: values of the constexpr parameters, in order.
        options: warps and stages.
    """

    def __init__(self, kernel: Any, grid: Grid, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self._first = partial(launch, kernel, grid, **constants, **options)
        self._grid = (*grid, 1, 1)[:3]
        self._constants = constants.values()
        self._launch: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        if self._launch is not None:
            self._launch(*args, *self._constants)
            return
        compiled = self._first(*args)
        if compiled is not None:
            self._launch = compiled[self._grid]
        elif _collected.get() is not None:
            self._launch = lambda *_: None
