"""``python -m bench.run --suite kernels``: the verbs themselves, in bytes a second, against the device's copy rate.

gate → time → row, as for the initializers: an output is held against float64 first. ``python -m bench.kernels --cold``
shows what the first call of a fresh process costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import Tensor

from pissa_kernels import ops

from . import memory
from .environment import ROOT
from .providers import Outcome
from .rows import Row, by_case, write_row
from .timing import interleaved, timed
from .verbs import CASES, Call, VerbCase, forced

# The copy that everything is held against, in bytes of one buffer: beyond every cache.
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# On a GPU a run is many launches, on weights in turn that do not fit its cache together.
LAUNCHES, ROTATION_BYTES = 20, 256 << 20
# Error relative to the reference verb's own. Tensor cores add with less care than float32 units do.
OURS_LIMIT = {"cpu": 1.1, "cuda": 2.0}
PEER_LIMIT = 4.0
COPY = "copy"


class VerbSubject:
    """A call on one weight, or on several in turn; in place on copies of them, made outside of the timed part."""

    def __init__(self, call: Call, weight: Tensor, inplace: bool) -> None:
        self.call = call
        self.weight = weight
        self.inplace = inplace
        self.launches = LAUNCHES if weight.is_cuda else 1
        size = weight.numel() * weight.element_size()
        self.copies = min(self.launches, ROTATION_BYTES // max(1, size) + 1) if weight.is_cuda else 1
        self.restore()

    def restore(self) -> None:
        if self.inplace or not hasattr(self, "weights"):
            self.weights = [self.weight.clone() for _ in range(self.copies)]

    def run(self) -> None:
        for index in range(self.launches):
            self.call(self.weights[index % self.copies])

    def outcome(self) -> Outcome:
        raise NotImplementedError("verbs are judged by their error")


class CopySubject(VerbSubject):
    """A copy between two buffers, the measure of the device."""

    def __init__(self, device: str) -> None:
        source = torch.zeros(COPY_BYTES[device] // 4, device=device)
        target = torch.zeros_like(source)
        super().__init__(lambda _: target.copy_(source), source[:1], inplace=False)
        self.launches = 1


@dataclasses.dataclass
class Trial:
    """A subject's figures: its error relative to the reference verb's, and why it may not be timed."""

    call: Call
    error: float = float("nan")
    reason: str | None = None


def run_case(case: VerbCase, device: str, repeats: int, about: Row) -> list[Row]:
    """Gate all subjects, time the green ones beside a copy, one row for each."""
    weight, left, right = case.inputs(device)
    exact = case.exact(weight, left, right)
    trials = {name: Trial(call) for name, call in case.calls(weight, left, right).items()}
    inplace = case.verb == "subtract_lowrank_"
    own = _error(trials["ours torch"].call, weight, exact)
    for name, trial in trials.items():
        judge(name, trial, weight, exact, own, device)
    del exact
    green = {name: trial for name, trial in trials.items() if trial.reason is None}
    subjects: dict[str, VerbSubject] = {name: VerbSubject(trial.call, weight, inplace) for name, trial in green.items()}
    subjects[COPY] = CopySubject(device)
    first = {name: timed(subject, device) for name, subject in subjects.items()}
    times = interleaved(dict(subjects), first, repeats, device)
    copy_rate = 2 * COPY_BYTES[device] / times[COPY].min_ms / 1e6
    chosen = f"ours {ops.backend(case.verb, weight)}"
    rows = []
    for name, trial in trials.items():
        row: Row = {"case": case.name, **dataclasses.asdict(case), "device": device, "provider": name}
        row |= {"ok": trial.reason is None, "reason": trial.reason, "error_ratio": trial.error}
        row |= {"chosen": name == chosen, "bytes": case.bytes, "copy_gb_per_s": copy_rate}
        row |= dict.fromkeys(("median_ms", "min_ms", "gb_per_s", "of_copy", "peak_extra_mib"))
        if name in times:
            best = times[name].min_ms / subjects[name].launches
            rate = case.bytes / best / 1e6
            row |= {"median_ms": times[name].median_ms / subjects[name].launches, "min_ms": best}
            row |= {"gb_per_s": rate, "of_copy": rate / copy_rate}
            if device == "cpu" and inplace and name.startswith("ours") and case.columns == 16:
                row["peak_extra_mib"] = peak_extra_mib(name.removeprefix("ours "), case.shape)
        rows.append(row | about)
    return rows


def judge(name: str, trial: Trial, weight: Tensor, exact: Tensor, own: float, device: str) -> None:
    """Fill in a trial's error and the reason against it, if there is one."""
    try:
        trial.error = _error(trial.call, weight, exact) / own if own else _error(trial.call, weight, exact)
    except Exception as error:
        trial.reason = f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return
    limit = OURS_LIMIT[device] if name.startswith("ours") else PEER_LIMIT
    if not trial.error <= (limit if own else 0.0):
        trial.reason = f"its error is {trial.error:.2g} times the reference verb's, above {limit}"


def _error(call: Call, weight: Tensor, exact: Tensor) -> float:
    """‖result − exact‖_F; a result that is not finite has an infinite one. A cast is right bit by bit, or wrong."""
    result: Any = call(weight.clone())
    result = result[1] if isinstance(result, tuple) else result
    if result.shape != exact.shape:
        raise ValueError(f"a result of shape {tuple(result.shape)} instead of {tuple(exact.shape)}")
    if not bool(result.isfinite().all()):
        return float("inf")
    if exact.shape == weight.mT.shape and torch.equal(exact, weight.double().mT):
        return 0.0 if torch.equal(result, weight.mT.to(result.dtype)) else float("inf")
    return float((result.double() - exact).norm())


def peak_extra_mib(backend: str, shape: tuple[int, int]) -> float | None:
    """MiB beyond the weight that a bf16 subtraction of rank 16 needs on the CPU, in a fresh process."""
    command = [sys.executable, "-m", "bench.kernels", "--memory", backend, *map(str, shape)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | memory.MALLOC, capture_output=True, text=True, check=True)
    peak: float | None = json.loads(done.stdout.splitlines()[-1])
    return peak


def measure_memory(backend: str, shape: tuple[int, int]) -> float | None:
    """The child's part of :func:`peak_extra_mib`."""
    case = VerbCase("subtract_lowrank_", shape, columns=16)
    weight, left, right = case.inputs("cpu")
    with forced(backend):
        ops.subtract_lowrank_(weight[:512, :512].clone(), left[:512].clone(), right[:, :512].clone(), 1.0)
        return memory.peak_of(lambda: ops.subtract_lowrank_(weight, left, right, 1.0))


def cold_seconds(backend: str, device: str, cache: str) -> tuple[float, float]:
    """Seconds of the first transpose_cast and the first subtract_lowrank_ of a process that has torch imported."""
    code = (
        "import json, time, torch; from pissa_kernels import ops\n"
        f"W = torch.ones(256, 256, dtype=torch.bfloat16, device={device!r}); B, A = W[:, :16].float(), W[:16].float()\n"
        "def timed(f):\n"
        "    began = time.perf_counter(); f(); float(W[0, 0]); return time.perf_counter() - began\n"
        "print(json.dumps([timed(lambda: ops.transpose_cast(W, torch.float32)),"
        " timed(lambda: ops.subtract_lowrank_(W, B, A, 1.0))]))"
    )
    environment = os.environ | {"PISSA_KERNELS_BACKEND": backend, "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    first, second = json.loads(done.stdout.splitlines()[-1])
    return first, second


def cold(device: str) -> str:
    """A table of first calls; Triton with an empty cache on disk, then with a full one."""
    weight = torch.ones(2, 2, device=device)
    lines = []
    with tempfile.TemporaryDirectory() as cache:
        for backend, reasons in ops.refusals("transpose_cast", weight).items():
            if not reasons:
                for state in ("empty cache", "cache on disk") if backend == "triton" else ("",):
                    seconds = cold_seconds(backend, device, cache)
                    lines.append((f"{backend} {state}".strip(), *(1e3 * second for second in seconds)))
    return cast(str, tabulate(lines, ("backend", "transpose_cast, ms", "subtract_lowrank_, ms"), floatfmt=".1f"))


def table(rows: list[Row], style: str = "simple") -> str:
    """Time, rate and error of each case; the star marks the backend that runs by itself."""
    lines = []
    for case, group in by_case(rows).items():
        for place, row in enumerate(group):
            label = case if place == 0 else ""
            name = f"{row['provider']} *" if row["chosen"] else row["provider"]
            if row["ok"]:
                memory_figure = "" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.1f}"
                figures = (f"{row['min_ms']:.3g}", f"{row['gb_per_s']:.3g}", f"{row['of_copy']:.0%}", memory_figure)
            else:
                figures = (f"red: {row['reason']}", "", "", "")
            error = "–" if row["error_ratio"] is None else f"{row['error_ratio']:.2f}"
            lines.append((label, name, *figures, error))
    headers = ("case", "who", "min ms", "GB/s", "of copy", "peak extra MiB", "error / reference's")
    alignment = ("left", "left", "right", "right", "right", "right", "right")
    return cast(str, tabulate(lines, headers, tablefmt=style, disable_numparse=True, colalign=alignment))


def select(only: str) -> list[VerbCase]:
    """Cases in whose name ``only`` is found."""
    return [case for case in CASES if re.search(only, case.name)]


def run_suite(cases: Sequence[VerbCase], out: Path, *, device: str, repeats: int, append: bool, about: Row) -> bool:
    """Measure the cases into ``out``; whether all was green."""
    green = True
    with out.open("a" if append else "w", encoding="utf-8") as file:
        for case in cases:
            print(case.name, file=sys.stderr, flush=True)
            for row in run_case(case, device, repeats, about):
                write_row(file, row)
                green &= bool(row["ok"])
    return green


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--cold", action="store_true", help="time the first calls of fresh processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", nargs=3, metavar=("BACKEND", "ROWS", "COLS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        backend, rows, cols = arguments.memory
        print(json.dumps(measure_memory(backend, (int(rows), int(cols)))))
    elif arguments.cold:
        print(cold(arguments.device))
    else:
        parser.error("--cold, or python -m bench.run --suite kernels")


if __name__ == "__main__":
    main()
