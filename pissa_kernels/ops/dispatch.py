"""Which backend runs a verb: one rule for all of them.

Backends are asked in the order that was measured to be fastest on the weight's kind of device
(``python -m bench.run --suite kernels``); the first that gives no reason against itself runs, plain torch at last.
``PISSA_KERNELS_BACKEND=name`` forces a backend for the verbs that it has, and raises where it cannot run the weight.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

VARIABLE = "PISSA_KERNELS_BACKEND"
BACKENDS = ("csrc", "triton", "torch")

MEMORY_BOUND = ("transpose_cast", "subtract_lowrank_")
PRODUCTS = ("matmul", "rmatmul", "normal")
CPU_ONLY = ("sum_of_squares", "gram_schmidt")
CSRC_OR_TORCH: tuple[str, ...] = ("csrc", "torch")
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    # csrc, where it was built, takes 0.5 to 1.1 of torch's time here, and of its products' 0.3 to 1.0.
    # Triton runs on the CPU under its interpreter, which is for tests: never by itself.
    "cpu": dict.fromkeys((*MEMORY_BOUND, *PRODUCTS, *CPU_ONLY), CSRC_OR_TORCH),
    # By estimate, not yet by figures: one read and one write of W against three or more of torch. csrc first, because
    # its binary needs no compiler at the first call; an initializer calls each verb once a weight.
    "cuda": dict.fromkeys(MEMORY_BOUND, ("csrc", "triton", "torch")) | dict.fromkeys(PRODUCTS, ("triton", "torch")),
}


def load(name: str) -> Any:
    """The backend's module, imported when first asked for: importing the package loads no library and no triton.

    It has some of the verbs, each with the signature of :mod:`pissa_kernels.ops.reference`'s, their names in
    ``verbs(device)``, and ``unsupported_reasons(verb, weight)``: why a verb cannot run on a weight, empty if it can.
    """
    # statements, which torch.compile can trace; importlib it cannot
    if name == "csrc":
        from . import csrc

        return csrc
    if name == "triton":
        from . import triton

        return triton
    from . import reference

    return reference


def unsupported_reasons(verb: str, weight: Tensor) -> dict[str, list[str]]:
    """For each backend, its reasons against running ``verb`` on ``weight``; an empty list where it can."""
    return {name: _reasons(name, verb, weight) for name in BACKENDS}


def select(verb: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs ``verb`` on ``weight``.

    Args:
        verb: one of the verbs.
        weight: (m, n), or (batch, m, n).
        dtype: in which a product is asked for. Only torch has float64.

    Raises:
        ValueError: ``PISSA_KERNELS_BACKEND`` names no backend.
        RuntimeError: it names one that cannot run this, with its reasons.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {forced!r}")
        if verb in load(forced).verbs(weight.device.type) and dtype == torch.float32:
            reasons = _reasons(forced, verb, weight)
            if reasons:
                raise RuntimeError(
                    f"{verb}: {VARIABLE}={forced} cannot run on a {tuple(weight.shape)} {_name(weight.dtype)} weight "
                    f"on {weight.device}: {'; '.join(reasons)}"
                )
            return forced
    if dtype == torch.float32:
        for name in ORDER.get(weight.device.type, {}).get(verb, ()):
            if name == "torch" or not _reasons(name, verb, weight):
                return name
    return "torch"


def _reasons(name: str, verb: str, weight: Tensor) -> list[str]:
    try:
        backend = load(name)
    except ImportError as error:
        return [f"it cannot be imported: {error}"]
    if verb not in backend.verbs(weight.device.type):
        return [f"it has no {verb} for {weight.device.type} tensors"]
    reasons: list[str] = backend.unsupported_reasons(verb, weight)
    return reasons


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
