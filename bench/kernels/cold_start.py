"""Time of the first kernel calls of a fresh process, for each backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch
from tabulate import tabulate

from pissa_kernels import ops

from .. import commands

# What the fresh process runs; torch is imported before the clock starts.
FIRST_CALLS = """
import json, sys, time, torch
from pissa_kernels import ops
W = torch.ones(256, 256, dtype=torch.bfloat16, device=sys.argv[1])
B, A = W[:, :16].float(), W[:16].float()
def timed(call):
    began = time.perf_counter()
    call()
    float(W[0, 0])
    return time.perf_counter() - began
calls = lambda: ops.transpose_cast(W, torch.float32), lambda: ops.subtract_lowrank_(W, B, A, 1.0)
print(json.dumps([timed(call) for call in calls]))
"""


def cold_seconds(backend: str, device: str, cache: str) -> tuple[float, float]:
    """Seconds of the first transpose_cast and of the first subtract_lowrank_ of a process that has imported torch.

    Args:
        backend: "csrc", "triton" or "torch".
        device: "cpu" or "cuda".
        cache: folder of Triton's cache.
    """
    environment = os.environ | {"PISSA_KERNELS_BACKEND": backend, "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", FIRST_CALLS, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    first, second = json.loads(done.stdout.splitlines()[-1])
    return first, second


def table(device: str) -> str:
    """First calls of each backend; of Triton with an empty cache on disk, then with a full one."""
    weight = torch.ones(2, 2, device=device)
    lines = []
    with tempfile.TemporaryDirectory() as cache:
        for backend, reasons in ops.unsupported_reasons("transpose_cast", weight).items():
            if not reasons:
                for state in ("empty cache", "cache on disk") if backend == "triton" else ("",):
                    seconds = cold_seconds(backend, device, cache)
                    lines.append((f"{backend} {state}".strip(), *(1e3 * second for second in seconds)))
    return str(tabulate(lines, ("backend", "transpose_cast, ms", "subtract_lowrank_, ms"), floatfmt=".1f"))


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, "Triton is timed with an empty cache on disk, then with a full one.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default: cpu)")
    print(table(parser.parse_args(argv).device))
    return 0
