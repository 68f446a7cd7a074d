"""The instruction set of csrc's kernels for CPUs.

The library has kernels for several sets and chooses the best that the CPU and the operating system support. Before it
uses a set, it compares that set's kernels with the generic ones on small matrices: where they are wrong, the next$
set is used. ``PISSA_KERNELS_ISA=name`` chooses a set by name and raises where it cannot be used.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes

VARIABLE = "PISSA_KERNELS_ISA"
# In the order of csrc/cpu/isa.h, the best first. "amx" is AVX-512 with bfloat16 products on AMX tiles.
NAMES = ("amx", "avx512", "avx2", "generic")
MISSING, DIFFERS = 1, 2
REASONS = {
    MISSING: "this CPU, its operating system or the library does not support it",
    DIFFERS: "its kernels disagree with the generic ones on this CPU",
}


# Kept here, so that torch.compile can trace what depends on it.
_current = ""


def unsupported_reasons() -> dict[str, str | None]:
    """For each of :data:`NAMES`, why it cannot be used; None if it can. Takes up to 3 ms the first time."""
    return {name: REASONS.get(status) for name, status in zip(NAMES, _figures(), strict=False)}


def current() -> str:
    """Name of the set in use. The library has been loaded."""
    return _current


def choose() -> None:
    """Use the set that ``PISSA_KERNELS_ISA`` names. Without it, warn if a better set disagrees with the generic one.

    Raises:
        ValueError: the variable names no set.
        RuntimeError: the set that it names cannot be used.
    """
    name = os.environ.get(VARIABLE)
    _note_current()
    if not name:
        for better, reason in unsupported_reasons().items():
            if reason == REASONS[DIFFERS]:
                warnings.warn(f"pissa_kernels: {better} is not used: {reason}", stacklevel=2)
        return
    if name not in NAMES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(NAMES)}, got {name!r}")
    if reason := unsupported_reasons()[name]:
        raise RuntimeError(f"{VARIABLE}={name} cannot be used: {reason}")
    _use(name)


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Use a set, in all threads, for the duration of the context.

    Raises:
        RuntimeError: the set cannot be used.
    """
    before = current()
    _use(name)
    try:
        yield
    finally:
        _use(before)


def _use(name: str) -> None:
    with _disable_current_modes():
        torch.ops.pissa_kernels.use_instruction_set(NAMES.index(name))
    _note_current()


def _note_current() -> None:
    global _current
    _current = NAMES[_figures()[-1]]


def _figures() -> list[int]:
    """The status of each set, and the index of the one in use. Real numbers under a mode of fake tensors, too."""
    with _disable_current_modes():
        return torch.ops.pissa_kernels.instruction_sets().tolist()  # type: ignore[no-any-return]
