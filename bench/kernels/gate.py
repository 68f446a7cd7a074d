"""The gate of the kernels: the error of an output, relative to the reference verb's own error against float64."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import torch
from torch import Tensor

from ..harness.poison import poisoned
from ..harness.trial import Trial
from .cases import Call, VerbCase

# Largest error relative to the reference verb's. Tensor cores round more coarsely than float32 units.
OURS_LIMIT = {"cpu": 1.1, "cuda": 2.0}
PEER_LIMIT = 4.0


@dataclass(kw_only=True)
class VerbTrial(Trial):
    """A call on one weight.

    Attributes:
        call: call to measure.
        error: its error relative to the reference verb's; NaN before the gate.
    """

    call: Call
    error: float = float("nan")


def check_all(
    case: VerbCase, trials: dict[str, VerbTrial], reference: Call, weight: Tensor, exact: tuple[Tensor, ...]
) -> None:
    """Fill in the error of each trial and, where it is too large, the reason.

    Args:
        case: verb and weight.
        trials: trials by provider.
        reference: call of the reference verb.
        weight: weight to call them on; not modified.
        exact: each result in float64.
    """
    try:
        own = errors(case, reference, weight, exact)
    except Exception:
        traceback.print_exc()
        for trial in trials.values():
            trial.reason = "the reference verb failed, so that there is no baseline"
        return
    for name, trial in trials.items():
        with trial.attempt():
            found = errors(case, trial.call, weight, exact)
            ratios = [one / base if base else one for one, base in zip(found, own, strict=True)]
            limit = OURS_LIMIT[weight.device.type] if name.startswith("ours") else PEER_LIMIT
            right = all(ratio <= (limit if base else 0.0) for ratio, base in zip(ratios, own, strict=True))
            trial.error = max(ratios)
            if not right:
                trial.reason = f"error {trial.error:.2g} times the reference verb's is above {limit}"


def errors(case: VerbCase, call: Call, weight: Tensor, exact: tuple[Tensor, ...]) -> list[float]:
    """‖result − exact‖_F of each result; infinite for a result that is not finite.

    The error of a cast is 0 if it is right bit by bit, otherwise infinite.

    Raises:
        ValueError: wrong number of results, wrong shape or dtype, or a transpose that is not contiguous.
    """
    with poisoned():
        returned = call(weight.clone())
    results = returned if isinstance(returned, tuple) else (returned,)
    return [_error(case, result, weight, part) for result, part in zip(results, exact, strict=True)]


def _error(case: VerbCase, result: object, weight: Tensor, exact: Tensor) -> float:
    if not isinstance(result, Tensor) or result.shape != exact.shape or result.dtype != case.result_dtype:
        raise ValueError(f"{case.name}: expected {tuple(exact.shape)} in {case.result_dtype}, got {result!r:.200}")
    if not bool(result.isfinite().all()):
        return float("inf")
    if case.verb == "transpose_cast":
        if not result.is_contiguous():
            raise ValueError(f"{case.name}: the transpose is not contiguous")
        return 0.0 if torch.equal(result, weight.mT.to(result.dtype)) else float("inf")
    return float((result.double() - exact).norm())
