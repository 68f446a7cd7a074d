"""Kernels against what the device can do: its copy rate, cuBLAS, and torch.linalg on the same small problems.

Each result passes the gate of the step "smoke" before it is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..__main__ import main as bench
from ..harness.dtypes import DTYPES
from ..harness.timing import interleaved, timed
from ..harness.trial import Trial
from ..kernels.run import COPY_BYTES, copy_subject
from .case import BatchedCase
from .dense_cases import Eigh, InverseCholesky
from .record import Recorder, Settings
from .smoke import available, body_of
from .weight_cases import Product, Subtraction, SumOfSquares

REPEATS = {"cuda": 3, "cpu": 1}
# A run has as many calls as fill this time, so that the time of the first launch does not count.
SECONDS_OF_RUN, CALLS = 0.01, 50
VERBS = r"^(transpose_cast|subtract_lowrank_)-4096x4096-bf16-(fp32|r16|r128)/"
SMALL_VERBS = r"^transpose_cast-1024x1024"
Call = Callable[[], object]


class Repeated:
    """Several calls in a row."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.calls = 1

    def restore(self) -> None:
        """Nothing changes."""

    def run(self) -> None:
        for _ in range(self.calls):
            self.call()


def kernels(recorder: Recorder) -> None:
    settings = recorder.settings
    copy = copy_subject(settings.device)
    rate = 2 * COPY_BYTES[settings.device] / min(timed(copy, settings.device) for _ in range(5))
    recorder.row("copy", "torch", gb_per_s=rate / 1e9)
    for case in cases(settings):
        measure(case, rate, recorder)
    verbs(recorder)


def cases(settings: Settings) -> Iterator[BatchedCase]:
    """Products with weights and panels of a model, other reads of the weights, and small problems."""
    width, inner, most = settings.width, settings.inner, min(256, settings.width)
    batch = 8 if settings.device == "cuda" else 2
    for columns in (128, 192, most):
        for precision in (1, 2, 3):
            for transposed in (False, True):
                yield Product(width, width, "bf16", batch, columns, precision, transposed)
    yield Product(inner, width, "bf16", batch, most, 1)
    yield Product(inner, width, "bf16", batch, most, 1, transposed=True)
    yield Product(most, width, batch=batch, columns=most, kind="gram")
    yield Product(width, most, batch=batch, columns=most, kind="change")
    yield SumOfSquares(width, width, "bf16", batch)
    yield from (Subtraction(width, width, "bf16", batch, rank) for rank in settings.ranks)
    full = settings.device == "cuda"
    for count, size in ((128, 256), (224, 128), (224, 100)):
        yield Eigh(size, size, batch=count if full else 2)
        yield InverseCholesky(4 * size, size, batch=count if full else 2)


def measure(case: BatchedCase, rate: float, recorder: Recorder) -> None:
    """Gate → time → row, for each implementation of an operation and its equivalent in torch.

    Args:
        case: operation and matrices.
        rate: bytes per second of a copy, read and written.
        recorder: takes the rows.
    """
    device = recorder.settings.device
    inputs = case.inputs(device)
    own = case.errors(inputs, case.call(body_of("torch"), inputs, case.batch))
    trials: dict[str, Trial] = {}
    names = available(device)
    # plain torch, one matrix after another, is what others are compared with; it is timed where there is no other
    for name in [name for name in names if name != "torch"] or names:
        trials[name] = Trial()
        with trials[name].attempt():
            units = case.units(case.errors(inputs, case.call(body_of(name), inputs, case.batch)), own)
            trials[name].reason = None if units <= 1 else f"error {units:.2g} times what is allowed"
            trials[name].subject = Repeated(partial(case.call, body_of(name), inputs, case.batch))
    for name, call in equivalents(case, inputs).items():
        trials[name] = Trial(subject=Repeated(call))
    subjects = {
        name: trial.subject
        for name, trial in trials.items()
        if trial.reason is None and isinstance(trial.subject, Repeated)
    }
    for name, subject in subjects.items():
        timed(subject, device)
        trials[name].first_seconds = seconds = timed(subject, device)
        subject.calls = max(1, min(CALLS, math.ceil(SECONDS_OF_RUN / seconds)))
    found = interleaved(subjects, {name: trials[name].first_seconds for name in subjects}, REPEATS[device], device)
    best = {name: times.min_ms / subjects[name].calls for name, times in found.items()}
    for name, trial in trials.items():
        recorder.row(case.name, name, reason=trial.reason, **rates(case, name, best, rate))


def rates(case: BatchedCase, name: str, best: dict[str, float], rate: float) -> dict[str, Any]:
    """The figures of a row: time, TFLOP/s, share of cuBLAS's and of the copy rate, ratio to torch.linalg."""
    if name not in best:
        return {}
    row: dict[str, Any] = {"min_ms": best[name]}
    weight = case.batch * case.m * case.n * DTYPES[case.dtype].itemsize
    if isinstance(case, Product):
        pieces = 1 if name == CUBLAS else case.pieces
        row["tflops"] = case.flops * pieces / best[name] / 1e9
        if name != CUBLAS and CUBLAS in best:
            row["of_cublas"] = best[CUBLAS] * pieces / best[name]
    if isinstance(case, Product | SumOfSquares):
        row["of_copy"] = weight / best[name] * 1e3 / rate
    if isinstance(case, Subtraction):
        row["of_copy"] = 2 * weight / best[name] * 1e3 / rate
    if LINALG in best and name != LINALG:
        row["speedup"] = best[LINALG] / best[name]
    return row


CUBLAS, LINALG = "cuBLAS bf16", "torch.linalg"


def equivalents(case: BatchedCase, inputs: Any) -> dict[str, Call]:
    """Torch's own way to do the same, by name; for products one bf16 product of stacked weights and panels."""
    if isinstance(case, Product) and case.kind == "product":
        weights, panel, _ = inputs
        stack, X = torch.stack(weights), panel.values.bfloat16()
        stack = stack.mT if case.transposed else stack
        return {CUBLAS: lambda: torch.bmm(stack, X)}
    if isinstance(case, Eigh):
        return {LINALG: lambda: torch.linalg.eigh(inputs)}
    if isinstance(case, InverseCholesky):
        eye = torch.eye(case.n, device=inputs.device)
        # positive definite, because a factorization that fails takes another time
        scaled = inputs / inputs.diagonal(dim1=-2, dim2=-1).amax().clamp(min=1e-30) + eye

        def by_torch() -> Tensor:
            factor, _ = torch.linalg.cholesky_ex(scaled)
            inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
            return inverse

        return {LINALG: by_torch}
    return {}


def verbs(recorder: Recorder) -> None:
    """``bench kernels`` on the memory-bound verbs; its rows are in a file of their own."""
    settings = recorder.settings
    only, repeats = (VERBS, 10) if settings.device == "cuda" else (SMALL_VERBS, 1)
    options = ["--device", settings.device, "--only", only, "--repeats", str(repeats), "--no-memory"]
    status = bench(["kernels", *options, "--out", str(settings.folder / "kernels.jsonl")])
    recorder.row("bench kernels", "step", reason=f"exit status {status}" if status else None)
