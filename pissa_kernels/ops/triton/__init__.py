"""The verbs as Triton kernels, for CUDA devices from sm_80 on and for AMD's, which torch calls "cuda", too.

CPU tensors run under Triton's interpreter, for tests. Each file has one kernel and its launch. Triton compiles a kernel
at the first call with a combination of dtypes and layouts, and caches the result on disk. :mod:`.batched` has the
operations on batches of weights, which are not verbs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .matmul import matmul, normal, rmatmul
from .pieces import INTERPRETED
from .subtract_lowrank import subtract_lowrank_
from .sum_of_squares import sum_of_squares
from .transpose_cast import transpose_cast

__all__ = [
    "VERBS",
    "matmul",
    "normal",
    "rmatmul",
    "subtract_lowrank_",
    "sum_of_squares",
    "transpose_cast",
    "unsupported_reasons",
    "verbs",
]

VERBS = ("matmul", "rmatmul", "normal", "transpose_cast", "subtract_lowrank_", "sum_of_squares")
OLDEST_CAPABILITY = (8, 0)


def verbs(device: str) -> tuple[str, ...]:
    """Names of the verbs that have a kernel, the same on every device."""
    return VERBS


def unsupported_reasons(verb: str, weight: Tensor) -> list[str]:
    """Why ``verb`` cannot run on ``weight``; an empty list if it can."""
    if weight.device.type == "cuda":
        reason = _device_reason(weight.device.index or 0)
    elif weight.device.type == "cpu" and INTERPRETED:
        reason = None
    elif weight.device.type == "cpu":
        reason = "the weight is on the CPU, and TRITON_INTERPRET was not 1 when triton was imported"
    else:
        reason = f"it has no body for {weight.device.type} tensors"
    reasons = [reason] if reason else []
    if torch.compiler.is_compiling() or isinstance(weight, FakeTensor):
        reasons.append("the weight is being traced")
    return reasons


@cache
def _device_reason(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return f"the device's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    return None
