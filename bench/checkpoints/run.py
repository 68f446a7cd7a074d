"""A whole checkpoint on disk: run → gate → row.

``pissa-kernels init`` is compared with transformers and PEFT without the patch, on a Llama-shaped checkpoint whose
projections have the spectra of real weights. The providers run in turn, each in a fresh process.

Before each run all dirty pages are written back, so that the run does not wait for those of an earlier one, and the
checkpoint is read once, so that it is in the page cache. After each run the result is synced; the rows have the time of
this sync as a field of its own, because ``init`` syncs its result itself and PEFT does not.

The result is the wall time of the process; the rows also split it into imports and work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..harness import benchmark, gate
from ..harness.benchmark import Benchmark, Settings
from ..harness.dtypes import DTYPES
from ..harness.paths import ROOT
from ..harness.rows import Row, fields_of, first_fields
from ..models.llama import ModelCase, add_case_arguments, case_of
from .child import DEFAULT, PROVIDERS
from .folder import checkpoint_of, distinct_projections, projections
from .gate import Verdict, check_result
from .table import table

MIB = 2**20
# Limit of our peak memory: this many weights of the largest target's size, plus this many MiB.
LIMIT_WEIGHTS, LIMIT_MIB = 4, 100


class Checkpoint(Benchmark[ModelCase]):
    """A whole checkpoint."""

    name = "checkpoint"
    repeats = 3
    providers = tuple(PROVIDERS)
    measures_memory = False  # each run is a fresh process and measures its own memory

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_case_arguments(parser)
        parser.add_argument("--sweep", action="store_true", help="also measure a fifth and twice as many layers")

    def select(
        self, parser: argparse.ArgumentParser, arguments: argparse.Namespace
    ) -> list[tuple[ModelCase, list[str]]]:
        whole = case_of(parser, arguments)
        providers = arguments.providers or list(DEFAULT)
        return [(case, providers) for case in (sweep(whole) if arguments.sweep else [whole])]

    def measure(self, case: ModelCase, providers: Sequence[str], settings: Settings) -> Iterator[Row]:
        """Run all providers ``repeats`` times in turn and check each result; one row per provider."""
        model = checkpoint_of(case)
        modules, checked = list(projections(case)), distinct_projections(case)
        runs: dict[str, list[Run]] = {name: [] for name in providers}
        verdicts: dict[str, list[Verdict]] = {name: [] for name in providers}
        for _ in range(settings.repeats):
            for name in providers:
                with tempfile.TemporaryDirectory(dir=gate.CACHE, prefix="checkpoint-result-") as folder:
                    out = Path(folder) / "out"
                    outcome = launch(name, model, out, case.rank, settings.device)
                    if isinstance(outcome, str):
                        verdicts[name].append(Verdict(outcome))
                        continue
                    runs[name].append(outcome)
                    verdicts[name].append(check_result(name, model, out, modules, checked))
        for name in providers:
            yield make_row(case, settings.device, name, verdicts[name], runs[name])

    def table(self, rows: list[Row]) -> str:
        return table(rows)


def sweep(whole: ModelCase) -> list[ModelCase]:
    """A checkpoint with a fifth of the layers, whole, and with twice as many layers."""
    layers = sorted({max(1, whole.layers // 5), whole.layers, 2 * whole.layers})
    return [dataclasses.replace(whole, layers=count) for count in layers]


@dataclass(frozen=True)
class Run:
    """Measurements of one process.

    Attributes:
        wall_s: seconds of the whole process, from the start of the interpreter.
        cpu_s: CPU seconds of the whole process, user and system, child processes included.
        imports_s: seconds until the provider's modules are imported.
        work_s: seconds after the imports.
        work_cpu_s: CPU seconds after the imports.
        imported_mib: resident set after the imports.
        peak_mib: largest growth of the resident set after the imports, mapped pages of files included.
        sync_s: seconds to sync the result after the process has ended.
    """

    wall_s: float
    cpu_s: float
    imports_s: float
    work_s: float
    work_cpu_s: float
    imported_mib: float
    peak_mib: float
    sync_s: float


def launch(provider: str, model: Path, out: Path, rank: int, device: str) -> Run | str:
    """Run one provider in a fresh process; returns the reason if it fails."""
    command = [sys.executable, "-m", "bench.checkpoints.child", provider, str(model), str(out), str(rank), device]
    os.sync()
    _read(model)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            return f"the process ended with {process.returncode}: {last}"
        inside: dict[str, float] = json.loads(output.read().splitlines()[-1])
    began = time.perf_counter()
    _sync(out)
    sync = time.perf_counter() - began
    return Run(wall_s=wall, cpu_s=usage.ru_utime + usage.ru_stime, sync_s=sync, **inside)


def _read(folder: Path) -> None:
    """Read the files of a folder into the page cache."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(4 * MIB):
                pass


def _sync(folder: Path) -> None:
    """fsync the files and folders below a folder, and no others."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def make_row(case: ModelCase, device: str, provider: str, verdicts: Sequence[Verdict], runs: Sequence[Run]) -> Row:
    """One line of the results: times of the shortest run, the largest peak, the worst accuracy."""
    reason = next((verdict.reason for verdict in verdicts if verdict.reason is not None), None)
    largest = max(rows * columns for rows, columns in projections(case).values())
    row = first_fields(case, device, provider, reason)
    row["checkpoint_bytes"] = sum(path.stat().st_size for path in checkpoint_of(case).glob("*.safetensors"))
    row["limit_mib"] = LIMIT_WEIGHTS * DTYPES[case.dtype].itemsize * largest / MIB + LIMIT_MIB
    shortest = min(runs, key=lambda run: run.wall_s) if reason is None else None
    row |= fields_of(Run, shortest)
    if shortest:
        row["peak_mib"] = max(run.peak_mib for run in runs)
    row["energy_deficit"] = _worst([verdict.energy_deficit for verdict in verdicts])
    row["rounding"] = _worst([verdict.rounding for verdict in verdicts])
    return row | {"repeats": len(runs), "runs": [dataclasses.asdict(run) for run in runs] if shortest else []}


def _worst(figures: Sequence[float | None]) -> float | None:
    return max((figure for figure in figures if figure is not None), default=None)


def main(name: str, argv: Sequence[str]) -> int:
    return benchmark.run(Checkpoint(), argv)
