"""Every operation on every backend against float64, on ragged shapes and on a model's.

A row's ``in_units`` is the error in units of what is allowed: for a verb the multiple of torch's own error in the gate
of ``bench kernels``, for an operation on batches :attr:`.case.BatchedCase.limits`. Operations on batches must also give
the same bits for a matrix alone and among others, and must not make the host wait for the GPU.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch

from pissa_kernels import ops

from ..harness.dtypes import DTYPES
from ..harness.trial import Trial
from ..kernels.cases import PRODUCTS, VerbCase
from ..kernels.gate import OURS_LIMIT, VerbTrial, check_all
from .case import BatchedCase
from .dense_cases import Eigh, InverseCholesky
from .record import Recorder, Settings
from .weight_cases import Product, Split, Subtraction, SumOfSquares

RAGGED = (129, 257)
BODIES = {"triton": "pissa_kernels.ops.triton.batched", "torch": "pissa_kernels.ops.batched_reference"}


def smoke(recorder: Recorder) -> None:
    settings = recorder.settings
    for verb_case in verb_cases(settings):
        check_verb(verb_case, recorder)
    for case in batched_cases(settings):
        check_batched(case, recorder)


def verb_cases(settings: Settings) -> Iterator[VerbCase]:
    """Every verb on a ragged weight in each dtype, and on the widest weight of a model."""
    for dtype in DTYPES:
        yield VerbCase("transpose_cast", RAGGED, dtype, target="fp32")
        yield from (VerbCase(verb, RAGGED, dtype, columns=24) for verb in PRODUCTS)
        for stored in (False, True):
            yield VerbCase("subtract_lowrank_", RAGGED, dtype, columns=16, fan_in_fan_out=stored)
    real, rank = (settings.inner, settings.width), max(settings.ranks)
    yield VerbCase("transpose_cast", real, target="fp32")
    yield VerbCase("subtract_lowrank_", real, columns=rank)
    yield from (VerbCase(verb, real, columns=96) for verb in ("matmul", "rmatmul"))


def batched_cases(settings: Settings) -> Iterator[BatchedCase]:
    """Every operation on ragged matrices and on those of a model, in each dtype, precision and orientation."""
    width, inner = settings.width, settings.inner
    for dtype in DTYPES:
        for precision in (1, 2, 3) if dtype == "bf16" else (1, 3):
            for transposed in (False, True):
                yield Product(*RAGGED, dtype, columns=24, precision=precision, transposed=transposed, update=True)
                if dtype == "bf16":
                    m, n = (inner, width) if transposed else (width, inner)
                    yield Product(m, n, dtype, columns=128, precision=precision, transposed=transposed)
        yield SumOfSquares(*RAGGED, dtype)
        yield from (Subtraction(*RAGGED, dtype, transposed=transposed) for transposed in (False, True))
    yield Product(*RAGGED, "bf16", columns=24, transposed=True, shared=True)
    yield Product(24, 257, columns=24, kind="gram")
    yield Product(257, 24, columns=24, kind="change")
    yield Split(257, 24)
    yield Product(128, width, columns=128, kind="gram")
    yield Product(width, 128, columns=128, kind="change")
    yield SumOfSquares(inner, width, "bf16")
    yield Subtraction(inner, width, "bf16", rank=max(settings.ranks))
    for size in (24, 100, 128, 256):
        yield InverseCholesky(4 * size, size)
        yield Eigh(size, size)


def check_verb(case: VerbCase, recorder: Recorder) -> None:
    """One row for each backend that runs a verb."""
    device = recorder.settings.device
    weight, left, right = case.inputs(device)
    calls = case.calls(weight, left, right)
    trials = {name: VerbTrial(call=call) for name, call in calls.items() if name.startswith("ours")}
    seconds = {}
    for name, trial in trials.items():
        with trial.attempt():
            seconds[name] = _timed(partial(trial.call, weight.clone()), device)
    check_all(case, trials, calls["ours torch"], weight, case.exact(weight, left, right))
    _synchronize(device)
    for name, trial in trials.items():
        units = trial.error / OURS_LIMIT[weight.device.type]
        recorder.row(
            case.name, name.removeprefix("ours "), reason=trial.reason, in_units=units, first_s=seconds.get(name)
        )


def check_batched(case: BatchedCase, recorder: Recorder) -> None:
    """One row for each module whose functions run on these matrices."""
    device = recorder.settings.device
    inputs = case.inputs(device)
    own = case.errors(inputs, case.call(body_of("torch"), inputs, case.batch))
    for name in available(device):
        trial, figures = Trial(), dict[str, Any]()
        with trial.attempt():
            body = body_of(name)
            began = time.perf_counter()
            results = case.call(body, inputs, case.batch)
            _synchronize(device)
            first = time.perf_counter() - began
            found = case.errors(inputs, results)
            units = case.units(found, own)
            figures = {"in_units": units, "errors": found, "torch_errors": own, "first_s": first}
            trial.reason = rejection(case, body, inputs, results, units)
        recorder.row(case.name, name, reason=trial.reason, **figures)
        _synchronize(device)


def rejection(
    case: BatchedCase, body: ModuleType, inputs: Any, results: tuple[torch.Tensor, ...], units: float
) -> str | None:
    """Why results are red, or None."""
    if not units <= 1:
        return f"error {units:.2g} times what is allowed"
    alone = case.call(body, inputs, 1)
    if not all(torch.equal(one, many) for one, many in _first_matrices(case, alone, results)):
        return "a matrix alone has other bits than in its batch"
    if body.__name__ != BODIES["torch"] and results[0].is_cuda:
        return waits(partial(case.call, body, inputs, case.batch))
    return None


def available(device: str) -> list[str]:
    """Names of the modules in :data:`BODIES` that should run on a device."""
    reasons = ops.unsupported_reasons("matmul", torch.empty(2, 2, device=device))
    return [name for name in BODIES if not reasons[name]]


def body_of(name: str) -> ModuleType:
    return importlib.import_module(BODIES[name])


def waits(call: Callable[[], object]) -> str | None:
    """Why a call makes the host wait for the GPU, as torch finds it; None if it does not."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return f"the host waits: {str(error)[:200]}"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def _first_matrices(
    case: BatchedCase, alone: tuple[torch.Tensor, ...], results: tuple[torch.Tensor, ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Results of a call on the first matrix, each beside that part of a call on the batch."""
    if case.function == "subtract_lowrank_":
        yield alone[0], results[0]
        return
    for one, many in zip(alone, results, strict=True):
        batch_dimension = 1 if one.ndim == 4 else 0  # pieces come first
        yield one, many.narrow(batch_dimension, 0, 1)


def _timed(call: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: str) -> None:
    """Wait for the GPU; raises if an error has spoilt the CUDA context, so that nothing else can run in the process."""
    if device == "cuda":
        torch.cuda.synchronize()
