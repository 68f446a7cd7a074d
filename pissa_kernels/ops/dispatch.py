"""Which backend runs a verb: one rule for all verbs.

Backends are tried in the order that was measured to be fastest on the kind of device (``python -m bench kernels``). The
first that supports the weight runs; plain torch supports everything. ``PISSA_KERNELS_BACKEND=name`` forces a backend
for the verbs that it has, and raises where it does not support the weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import VERBS

if TYPE_CHECKING:
    from .batched import Weights

VARIABLE = "PISSA_KERNELS_BACKEND"
BACKENDS = ("csrc", "triton", "torch")

MEMORY_BOUND = ("transpose_cast", "subtract_lowrank_")
PRODUCTS = ("matmul", "rmatmul", "normal")
CSRC_OR_TORCH: tuple[str, ...] = ("csrc", "torch")
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    # csrc takes 0.5 to 1.1 of the time of torch's body, and 0.3 to 1.0 for products. Triton's interpreter is for tests,
    # so Triton is never chosen on the CPU.
    "cpu": dict.fromkeys(VERBS, CSRC_OR_TORCH),
    # On an H200, csrc takes 0.6 and 0.5 of Triton's time for a transpose and for rank 16, and 1.3 of it for rank 128;
    # torch takes 2.4, 3.7 and 1.7 of csrc's. csrc compiles nothing at the first call.
    "cuda": dict.fromkeys(MEMORY_BOUND, ("csrc", "triton", "torch"))
    | dict.fromkeys((*PRODUCTS, "sum_of_squares"), ("triton", "torch")),
}


def load(name: str) -> Any:
    """Import a backend's module. Importing the package loads neither a library nor triton.

    A backend has some of the verbs, with the signatures of :mod:`pissa_kernels.ops.reference`; ``verbs(device)``, their
    names; and ``unsupported_reasons(verb, weight)``, why a verb cannot run on a weight, empty if it can.
    """
    # import statements, because torch.compile cannot trace importlib
    if name == "csrc":
        from . import csrc

        return csrc
    if name == "triton":
        from . import triton

        return triton
    from . import reference

    return reference


def unsupported_reasons(verb: str, weight: Tensor) -> dict[str, list[str]]:
    """For each backend, why it cannot run ``verb`` on ``weight``; an empty list if it can."""
    return {name: _reasons(name, verb, weight) for name in BACKENDS}


def bind(verb: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """The function of the chosen backend that runs ``verb`` on weights of this dtype, device and layout.

    It checks nothing and may record an autograd graph: for callers that make many calls on checked arguments.

    Raises:
        ValueError, RuntimeError: as :func:`select`.
    """
    body: Callable[..., Any] = getattr(load(select(verb, weight, dtype)), verb)
    return body


def select(verb: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs ``verb`` on ``weight``.

    Args:
        verb: one of the verbs.
        weight: (m, n), or (batch, m, n).
        dtype: of the panel. Only torch's body has float64.

    Raises:
        ValueError: ``PISSA_KERNELS_BACKEND`` names no backend.
        RuntimeError: the backend that it names does not support this weight; the message says why.
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
            if name == "torch" or not (_reasons(name, verb, weight) or _is_slow(name, verb, weight)):
                return name
    return "torch"


def bodies(weights: Weights) -> Any:
    """The module that has the operations on batches of these weights: Triton's where it supports them, else torch's.

    Both have ``product``, ``split``, ``inverse_cholesky``, ``eigh``, ``sum_of_squares``, ``subtract_lowrank_`` and
    ``compile_ahead``.
    """
    weight, forced = weights.tensors[0], os.environ.get(VARIABLE)
    wanted = (weight.is_cuda and forced != "torch") or forced == "triton"
    if wanted and not _reasons("triton", "matmul", weight):
        from .triton import batched

        return batched
    from . import batched_reference

    return batched_reference


def _reasons(name: str, verb: str, weight: Tensor) -> list[str]:
    try:
        backend = load(name)
    except ImportError as error:
        return [f"it cannot be imported: {error}"]
    if verb not in backend.verbs(weight.device.type):
        return [f"it has no {verb} for {weight.device.type} tensors"]
    reasons: list[str] = backend.unsupported_reasons(verb, weight)
    return reasons


def _is_slow(name: str, verb: str, weight: Tensor) -> bool:
    return name == "csrc" and not weight.is_cuda and bool(load(name).is_slow(verb))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
