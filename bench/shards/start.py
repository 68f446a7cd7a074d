"""Starts the processes of :mod:`.worker`, and reads what they have found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..harness.fresh import MALLOC
from ..harness.paths import ROOT
from . import worker
from .case import Case
from .worker import Found

# Longest time in which one process may end after another.
TIMEOUT = 1800


def found_by_processes(
    case: Case, weight: torch.Tensor, providers: Sequence[str], *, repeats: int = 0, memory: bool = False
) -> dict[str, Found]:
    """What the processes of a case find, by provider.

    Args:
        case: the case.
        weight: its weight.
        providers: names.
        repeats: timed runs of each provider.
        memory: whether to measure peak memory and nothing else.

    Raises:
        RuntimeError: a process has failed.
    """
    job = {
        "processes": case.processes,
        "dim": case.dim,
        "rank": case.rank,
        "providers": list(providers),
        "repeats": repeats,
        "memory": memory,
    }
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(MALLOC if memory else {})}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.json").write_text(json.dumps(job))
        torch.save(weight, Path(folder, "weight.pt"))
        started = [
            subprocess.Popen([sys.executable, "-m", worker.__name__, folder, str(process)], cwd=ROOT, env=variables)
            for process in range(case.processes)
        ]
        try:
            codes = [process.wait(TIMEOUT) for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            raise RuntimeError(f"{case.name}: the processes ended with {codes}")
        found = json.loads(Path(folder, "found.json").read_text())
    return {name: Found(**fields) for name, fields in found.items()}
