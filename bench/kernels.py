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
from typing import cast

import torch
from tabulate import tabulate
from torch import Tensor

from pissa_kernels import ops

from . import memory, resident
from .environment import ROOT
from .providers import Outcome
from .rows import Row, by_case, write_row
from .timing import interleaved, timed
from .verb_gate import Trial, judge_all
from .verbs import CASES, Call, VerbCase, forced

# The copy that everything is held against, in bytes of one buffer: beyond every cache.
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# On a GPU a run is many launches, on weights in turn that do not fit its cache together.
LAUNCHES, ROTATION_BYTES = 20, 256 << 20
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


def run_case(
    case: VerbCase, names: Sequence[str], device: str, repeats: int, about: Row, *, with_memory: bool
) -> list[Row]:
    """Gate the named subjects, time the green ones beside a copy, one row for each."""
    weight, left, right = case.inputs(device)
    calls = case.calls(weight, left, right)
    trials = {name: Trial(calls[name]) for name in names}
    judge_all(case, trials, calls["ours torch"], weight, case.exact(weight, left, right))
    inplace = case.verb == "subtract_lowrank_"
    green = {name: trial for name, trial in trials.items() if trial.reason is None}
    subjects: dict[str, VerbSubject] = {name: VerbSubject(trial.call, weight, inplace) for name, trial in green.items()}
    subjects[COPY] = CopySubject(device)
    first = {name: timed(subject, device) for name, subject in subjects.items()}
    times = interleaved(dict(subjects), first, repeats, device)
    copy_rate = 2 * COPY_BYTES[device] / times[COPY].min_ms / 1e6
    chosen = f"ours {ops.backend(case.verb, weight)}"
    rows = []
    for name, trial in trials.items():
        peak = None
        if with_memory and name in green and _has_memory(case, name, device):
            peak = measured_peak(trial, name, case)
        row: Row = {"case": case.name, **dataclasses.asdict(case), "device": device, "provider": name}
        row |= {"ok": trial.reason is None, "reason": trial.reason, "error_ratio": trial.error}
        row |= {"chosen": name == chosen, "bytes": case.bytes, "copy_gb_per_s": copy_rate}
        row |= dict.fromkeys(("median_ms", "min_ms", "gb_per_s", "of_copy")) | {"peak_extra_mib": peak}
        if trial.reason is None:
            best = times[name].min_ms / subjects[name].launches
            rate = case.bytes / best / 1e6
            row |= {"median_ms": times[name].median_ms / subjects[name].launches, "min_ms": best}
            row |= {"gb_per_s": rate, "of_copy": rate / copy_rate}
        rows.append(row | about)
    return rows


def _has_memory(case: VerbCase, name: str, device: str) -> bool:
    return device == "cpu" and case.verb == "subtract_lowrank_" and case.columns == 16 and name.startswith("ours")


def measured_peak(trial: Trial, name: str, case: VerbCase) -> float | None:
    """Peak memory in a fresh process; what fails there is red."""
    try:
        return peak_extra_mib(name.removeprefix("ours "), case)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        trial.reason = "failed in a process of its own"
        return None


def peak_extra_mib(backend: str, case: VerbCase) -> float | None:
    """MiB beyond the weight that a subtraction needs on the CPU, in a fresh process."""
    command = [sys.executable, "-m", "bench.kernels", "--memory", backend, json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | memory.MALLOC, capture_output=True, text=True, check=True)
    peak: float | None = json.loads(done.stdout.splitlines()[-1])
    return peak


def measure_memory(backend: str, case: VerbCase) -> float | None:
    """The child's part of :func:`peak_extra_mib`."""
    weight, left, right = case.inputs("cpu")
    small = weight[:512, :512].clone(), left[:512].clone(), right[:, :512].clone()
    with forced(backend):
        ops.subtract_lowrank_(*small, 1.0, case.fan_in_fan_out)
        return resident.peak_of(lambda: ops.subtract_lowrank_(weight, left, right, 1.0, case.fan_in_fan_out))


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
        for backend, reasons in ops.unsupported_reasons("transpose_cast", weight).items():
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


def select(only: str, device: str) -> list[tuple[VerbCase, list[str]]]:
    """Cases, each with those of its providers for which ``only`` is found in "case/provider"."""
    pattern = re.compile(only)
    found = [(case, [n for n in case.providers(device) if pattern.search(f"{case.name}/{n}")]) for case in CASES]
    return [(case, names) for case, names in found if names]


def run_suite(
    chosen: Sequence[tuple[VerbCase, list[str]]],
    out: Path,
    *,
    device: str,
    repeats: int,
    append: bool,
    about: Row,
    with_memory: bool = True,
) -> bool:
    """Measure the chosen into ``out``; whether all was green."""
    green = True
    with out.open("a" if append else "w", encoding="utf-8") as file:
        for case, names in chosen:
            print(case.name, file=sys.stderr, flush=True)
            for row in run_case(case, names, device, repeats, about, with_memory=with_memory):
                write_row(file, row)
                green &= bool(row["ok"])
    return green


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--cold", action="store_true", help="time the first calls of fresh processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", nargs=2, metavar=("BACKEND", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        backend, fields = arguments.memory
        print(json.dumps(measure_memory(backend, VerbCase(**json.loads(fields)))))
    elif arguments.cold:
        print(cold(arguments.device))
    else:
        parser.error("--cold, or python -m bench.run --suite kernels")


if __name__ == "__main__":
    main()
