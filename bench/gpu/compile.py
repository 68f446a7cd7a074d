"""Compile what the other steps need: csrc with nvcc, and meanwhile Triton's kernels in threads.

Triton keeps its results on disk, where the next steps find them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from ..harness.paths import ROOT
from ..kernels.cases import forced
from .record import Recorder, Settings
from .smoke import available, batched_cases, body_of, verb_cases

NVCC_SECONDS = 75
# Kernels whose compilation is listed.
SLOWEST = 12


def compile_all(recorder: Recorder) -> None:
    with ThreadPoolExecutor(1) as pool:
        csrc = pool.submit(build_csrc) if can_build(recorder.settings.device) else None
        try:
            compile_triton(recorder)
        finally:
            if csrc is not None:
                seconds, failure = csrc.result()
                recorder.row("csrc", "nvcc", reason=failure, wall_s=seconds)


def can_build(device: str) -> bool:
    return device == "cuda" and bool(shutil.which("nvcc")) and bool(torch.version.cuda)


def build_csrc() -> tuple[float, str | None]:
    """Build the CUDA library in place; seconds, and why it failed."""
    began = time.perf_counter()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"PISSA_KERNELS_BUILD": "cuda"}
    try:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=NVCC_SECONDS)
        failure = None
    except subprocess.TimeoutExpired:
        failure = f"stopped after {NVCC_SECONDS} s"
    except subprocess.CalledProcessError as error:
        failure = f"exit status {error.returncode}"
    return time.perf_counter() - began, failure


def compile_triton(recorder: Recorder) -> None:
    """Call each kernel once, in threads, and list the times of compilation. Errors are for the step "smoke"."""
    settings = recorder.settings
    if settings.device != "cuda" or "triton" not in available(settings.device):
        recorder.row("kernels", "triton", compiled=0)
        return
    import triton

    times: list[tuple[float, str]] = []

    def listener(*, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            found.append((times.total / 1e6, str(metadata.get("name"))))

    found, triton.knobs.compilation.listener = times, listener
    began = time.perf_counter()
    try:
        with forced("triton"), ThreadPoolExecutor(os.cpu_count()) as pool:
            failures = [reason for reason in pool.map(_attempted, calls(settings)) if reason]
    finally:
        triton.knobs.compilation.listener = None
    for seconds, name in sorted(times, reverse=True)[:SLOWEST]:
        print(f"      {seconds:6.2f} s  {name}")
    total = sum(seconds for seconds, _ in times)
    wall = time.perf_counter() - began
    recorder.row("kernels", "triton", compiled=len(times), compile_s=total, wall_s=wall, failed=len(failures))


def calls(settings: Settings) -> Iterator[Callable[[], object]]:
    """Every call of the step "smoke" that runs in Triton."""
    for verb_case in verb_cases(settings):
        yield partial(_verb, verb_case, settings.device)
    for case in batched_cases(settings):
        yield partial(_batched, case, settings.device)


def _verb(case: Any, device: str) -> None:
    weight, left, right = case.inputs(device)
    found = case.calls(weight, left, right).get("ours triton")
    if found is not None:
        found(weight.clone())


def _batched(case: Any, device: str) -> None:
    case.call(body_of("triton"), case.inputs(device), case.batch)


def _attempted(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None
