"""The gate of the verbs: an output is held against float64 and the reference verb's own error before it is timed."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .verbs import Call, VerbCase

# Error relative to the reference verb's own. Tensor cores add with less care than float32 units do.
OURS_LIMIT = {"cpu": 1.1, "cuda": 2.0}
PEER_LIMIT = 4.0


@dataclass
class Trial:
    """A subject's figures: its error relative to the reference verb's, and why it may not be timed."""

    call: Call
    error: float = float("nan")
    reason: str | None = None


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what ``empty`` returns with NaN.

    Without it a fresh output may lie where an earlier, right one was freed, and what nobody writes looks right.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuBLAS asks for a workspace setting, which changes nothing here
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def judge_all(
    case: VerbCase, trials: dict[str, Trial], reference: Call, weight: Tensor, exact: tuple[Tensor, ...]
) -> None:
    """Fill in each trial's error and the reason against it, if there is one."""
    try:
        own = errors(case, reference, weight, exact)
    except Exception:
        traceback.print_exc()
        for trial in trials.values():
            trial.reason = "the reference verb failed, so there is nothing to hold this against"
        return
    for name, trial in trials.items():
        try:
            found = errors(case, trial.call, weight, exact)
        except Exception as error:
            traceback.print_exc()
            trial.reason = f"raised {type(error).__name__}"  # its message may hold paths
            continue
        ratios = [one / base if base else one for one, base in zip(found, own, strict=True)]
        limit = OURS_LIMIT[weight.device.type] if name.startswith("ours") else PEER_LIMIT
        right = all(ratio <= (limit if base else 0.0) for ratio, base in zip(ratios, own, strict=True))
        trial.error = max(ratios)
        if not right:
            trial.reason = f"its error is {trial.error:.2g} times the reference verb's, above {limit}"


def errors(case: VerbCase, call: Call, weight: Tensor, exact: tuple[Tensor, ...]) -> list[float]:
    """‖result − exact‖_F of each result; one that is not finite has an infinite error.

    A cast is right bit by bit, or its error is infinite.

    Raises:
        ValueError: a result of another number, shape or dtype, or a transpose that is not contiguous.
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
