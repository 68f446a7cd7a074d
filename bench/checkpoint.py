"""``python -m bench.checkpoint``: a whole checkpoint on disk, run → gate → row.

``python -m pissa_kernels init`` against transformers with stock PEFT, each in a fresh process of its own, in turn, on a
Llama-shaped checkpoint whose projections have the spectra of real ones. Before a run everything is brought to the disk,
so that no earlier run's pages are written during it, and the checkpoint is read once, so that each finds it in memory.
After it the result is brought to the disk, which is timed on its own: one provider has done so already, the other not.

The wall time of the process is what counts; the rows also split it into imports and work.
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
from datetime import datetime, timezone
from pathlib import Path
from typing import cast

import torch
from tabulate import tabulate

from . import environment, gate
from .cases import DTYPES
from .checkpoint_case import checkpoint_of, distinct_projections, projections
from .checkpoint_child import PROVIDERS
from .checkpoint_gate import Verdict, judge
from .llama import ModelCase, add_case_arguments, case_of
from .rows import Row, by_case, read_rows, write_row
from .run import RESULTS

OURS = "ours pissa"
MIB = 2**20
# What our peak may be: weights of the largest target's size, and MiB besides.
LIMIT_WEIGHTS, LIMIT_MIB = 4, 100
HEADERS = (
    *("checkpoint", "provider", "wall s", f"× {OURS}", "imports s", "work s", "work CPU s", "sync s"),
    *("peak MiB", "limit MiB", "energy deficit", "rounding"),
)


@dataclass(frozen=True)
class Run:
    """What the system says of one process.

    Attributes:
        wall_s, cpu_s: of the whole process, the interpreter's start included; CPU is user and system, children's too.
        imports_s: seconds until the provider's modules were imported.
        work_s, work_cpu_s: after that.
        imported_mib: resident after the imports.
        peak_mib: the most that the resident set grew by after them, file pages that are mapped included.
        sync_s: seconds to bring the result to the disk after the process has ended.
    """

    wall_s: float
    cpu_s: float
    imports_s: float
    work_s: float
    work_cpu_s: float
    imported_mib: float
    peak_mib: float
    sync_s: float


def run_case(case: ModelCase, providers: Sequence[str], *, device: str, repeats: int) -> Iterator[Row]:
    """Run all providers ``repeats`` times in turn, judge each result; one row for each provider."""
    model = checkpoint_of(case)
    modules, checked = list(projections(case)), distinct_projections(case)
    runs: dict[str, list[Run]] = {name: [] for name in providers}
    verdicts: dict[str, list[Verdict]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name in providers:
            with tempfile.TemporaryDirectory(dir=gate.CACHE, prefix="checkpoint-result-") as folder:
                out = Path(folder) / "out"
                outcome = launch(name, model, out, case.rank, device)
                if isinstance(outcome, str):
                    verdicts[name].append(Verdict(outcome))
                    continue
                runs[name].append(outcome)
                verdicts[name].append(judge(name, model, out, modules, checked))
    for name in providers:
        yield make_row(case, device, name, verdicts[name], runs[name])


def launch(provider: str, model: Path, out: Path, rank: int, device: str) -> Run | str:
    """One process of one provider; where it fails, why."""
    command = [sys.executable, "-m", "bench.checkpoint_child", provider, str(model), str(out), str(rank), device]
    os.sync()
    _read(model)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=environment.ROOT, stdout=output, stderr=errors)
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
    """Let the system have a folder's files in memory."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(4 * MIB):
                pass


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, and nobody else's."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def make_row(case: ModelCase, device: str, provider: str, verdicts: Sequence[Verdict], runs: Sequence[Run]) -> Row:
    """One line of the results: times of the shortest run, the largest peak, the worst accuracy."""
    reason = next((verdict.reason for verdict in verdicts if verdict.reason is not None), None)
    shapes = projections(case).values()
    item = DTYPES[case.dtype].itemsize
    row: Row = {"case": case.name, **dataclasses.asdict(case), "device": device, "provider": provider}
    row |= {"ok": reason is None, "reason": reason}
    row["checkpoint_bytes"] = sum(path.stat().st_size for path in checkpoint_of(case).glob("*.safetensors"))
    row["limit_mib"] = LIMIT_WEIGHTS * item * max(m * n for m, n in shapes) / MIB + LIMIT_MIB
    best = min(runs, key=lambda run: run.wall_s) if reason is None else None
    row |= dataclasses.asdict(best) if best else dict.fromkeys(field.name for field in dataclasses.fields(Run))
    if best:
        row["peak_mib"] = max(run.peak_mib for run in runs)
    row["energy_deficit"] = _worst([verdict.energy_deficit for verdict in verdicts])
    row["rounding"] = _worst([verdict.rounding for verdict in verdicts])
    return row | {"repeats": len(runs), "runs": [dataclasses.asdict(run) for run in runs] if best else []}


def _worst(figures: Sequence[float | None]) -> float | None:
    return max((figure for figure in figures if figure is not None), default=None)


def checkpoint_table(rows: list[Row], style: str = "simple") -> str:
    """Times, memory and accuracy of each provider on each checkpoint; ``style`` is a format of the tabulate package."""
    lines = []
    for case, group in by_case(rows).items():
        ours = next((row["wall_s"] for row in group if row["provider"] == OURS), None)
        for place, row in enumerate(group):
            label = f"{case}, {row['checkpoint_bytes'] / 1e9:.1f} GB" if place == 0 else ""
            lines.append([label, *_cells(row, ours)])
    alignment = ("left", "left", *["right"] * (len(HEADERS) - 2))
    return cast(str, tabulate(lines, HEADERS, tablefmt=style, disable_numparse=True, colalign=alignment))


def _cells(row: Row, ours: float | None) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "–" if row[key] is None else format(row[key], form)

    ratio = f"{row['wall_s'] / ours:.2f}" if row["ok"] and ours else "–"
    return [
        row["provider"] if row["ok"] else f"{row['provider']}, red: {row['reason']}",
        *(shown("wall_s", ".1f"), ratio),
        *(shown(key, ".1f") for key in ("imports_s", "work_s", "work_cpu_s", "sync_s")),
        shown("peak_mib", ".0f"),
        shown("limit_mib", ".0f") if row["provider"] == OURS else "–",
        *(shown("energy_deficit", ".1e"), shown("rounding", ".3g")),
    ]


def cases(arguments: argparse.Namespace) -> list[ModelCase]:
    """The checkpoint asked for; with ``--sweep`` also one of a fifth of the layers, and one of twice as many."""
    whole: ModelCase = arguments.case
    if not arguments.sweep:
        return [whole]
    layers = sorted({max(1, whole.layers // 5), whole.layers, 2 * whole.layers})
    return [dataclasses.replace(whole, layers=count) for count in layers]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    green = True
    with arguments.out.open("a" if arguments.append else "w", encoding="utf-8") as file:
        for case in cases(arguments):
            print(case.name, file=sys.stderr, flush=True)
            about: Row = {
                "machine": environment.machine(arguments.device),
                "versions": environment.versions(),
                "commit": environment.commit(),
                "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
            }
            for row in run_case(case, arguments.providers, device=arguments.device, repeats=arguments.repeats):
                write_row(file, row | about)
                green &= row["ok"]
    print(checkpoint_table(read_rows(arguments.out)))
    return 0 if green else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint", description=__doc__)
    add_case_arguments(parser)
    parser.add_argument("--sweep", action="store_true", help="also a fifth of the layers, and twice as many")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where weights are decomposed")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each provider (3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/checkpoint-DEVICE.jsonl")
    parser.add_argument("--append", action="store_true", help="keep the rows that the file has")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error("numbers are 1 or more")
    arguments.case = case_of(parser, arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device")
    arguments.out = arguments.out or RESULTS / f"checkpoint-{arguments.device}.jsonl"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
