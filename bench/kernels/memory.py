"""Peak memory of a subtraction beyond its weight, measured in a fresh process on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from pissa_kernels import ops

from ..harness import fresh
from ..harness.resident import peak_of
from .cases import VerbCase, forced


def is_measured(case: VerbCase, provider: str, device: str) -> bool:
    """Whether a row of this provider gets a peak: our subtractions of rank 16 on the CPU."""
    return device == "cpu" and case.verb == "subtract_lowrank_" and case.columns == 16 and provider.startswith("ours")


def peak_extra_mib(backend: str, case: VerbCase) -> float | None:
    """MiB beyond the weight, measured in a fresh process; None where the system cannot measure it.

    Raises:
        subprocess.CalledProcessError: the fresh process failed; ``stderr`` contains its traceback.
    """
    return fresh.call(measure, backend, dataclasses.asdict(case))


def measure(backend: str, fields: dict[str, Any]) -> float | None:
    """The part of :func:`peak_extra_mib` in the fresh process: warm up on a small weight, then run once."""
    case = VerbCase(**fields)
    weight, left, right = case.inputs("cpu")
    small = weight[:512, :512].clone(), left[:512].clone(), right[:, :512].clone()
    with forced(backend):
        ops.subtract_lowrank_(*small, 1.0, case.fan_in_fan_out)
        return peak_of(lambda: ops.subtract_lowrank_(weight, left, right, 1.0, case.fan_in_fan_out))
