"""``python -m bench.gpu``: everything that a GPU can tell, in less than eight minutes on an H100.

Builds the CUDA extension where nvcc is on the PATH, runs the tests that need a device, then the benchmarks. What the
steps print goes to bench/results/gpu.log as well, their rows to bench/results. A step that fails or takes too long does
not keep the others from running; the exit status is 1 then, and 2 without a device.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from tabulate import tabulate

from .environment import ROOT

LOG = ROOT / "bench" / "results" / "gpu.log"


@dataclass(frozen=True)
class Step:
    """A command with the seconds that it may take, and what is added to its environment."""

    name: str
    command: tuple[str, ...]
    limit: int
    environment: tuple[tuple[str, str], ...] = ()


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def bench(suite: str, *arguments: str) -> tuple[str, ...]:
    return python("-m", "bench.run", "--suite", suite, "--device", "cuda", *arguments)


BUILD = Step(
    "build csrc", python("setup.py", "-q", "build_ext", "--inplace"), 75, (("PISSA_KERNELS_BUILD", "cuda"),)
)  # fmt: skip
STEPS = (
    Step("tests", python("-m", "pytest", "-q", "tests/gpu", "tests/ops/test_backends.py"), 150),
    Step("kernels", bench("kernels", "--repeats", "10"), 60),
    Step("engine", bench("engine", "--repeats", "3", "--no-memory"), 100),
    Step("real model", bench("real", "--repeats", "3", "--no-memory"), 60),
    Step("first calls", python("-m", "bench.kernels", "--cold", "--device", "cuda"), 25),
)


# A path from the root of the file system, at the start of a word or after a compiler's -I or -L.
ABSOLUTE = re.compile(r"(?:(?<![\w./~])|(?<=-[IL]))/(?:[\w.+@-]+/)*([\w.+@-]+)/?")


def scrubbed(line: str) -> str:
    """A line without the paths and the name that only this machine has; of other paths the last part stays."""
    for path, name in ((str(ROOT), "."), (str(Path.home()), "~"), (sys.prefix, "PREFIX")):
        line = line.replace(path, name)
    host = re.escape(socket.gethostname())
    return ABSOLUTE.sub(r"…/\1", re.sub(rf"(?<![\w-]){host}(?![\w-])", "HOST", line))


def run_step(step: Step, log: TextIO) -> tuple[bool, float]:
    """Run one step, its output to the terminal and to ``log``; whether it was green, and its seconds."""
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
        print(f"{step.name}: not done after {step.limit} s", file=log, flush=True)
    return child.returncode == 0, seconds


def run(steps: Sequence[Step], log_path: Path = LOG) -> bool:
    """Run all steps and print what became of them; whether all were green."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8") as log:
        results = [(step.name, *run_step(step, log)) for step in steps]
        lines = [(name, "green" if ok else "RED", f"{seconds:.0f}") for name, ok, seconds in results]
        summary = tabulate(lines, ("step", "", "seconds"))
        print(f"\n{summary}")
        print(f"\n{summary}", file=log)
    return all(ok for _, ok, _ in results)


def main() -> int:
    if not torch.cuda.is_available():
        print("bench.gpu: this torch sees no CUDA device", file=sys.stderr)
        return 2
    build = (BUILD,) if shutil.which("nvcc") and torch.version.cuda else ()
    return 0 if run((*build, *STEPS)) else 1


if __name__ == "__main__":
    sys.exit(main())
