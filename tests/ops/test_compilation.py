"""Compilation ahead of the first launch: with a real compiler, and a driver that loads nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa_kernels.ops.triton import compilation

# The schedule's dry run on a weight on the CPU, for sm_90; then the same launches again, which must find every kernel.
SCRIPT = """
import json, torch, triton
from triton.backends.compiler import GPUTarget

loaded, launched = [], []

class Launcher:
    def __init__(self, source, metadata):
        pass
    def __call__(self, *args):
        launched.append(len(args))

class Utils:
    def load_binary(self, name, *args):
        loaded.append(name)
        return 0, 0, 0, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "warpSize": 32}

class Driver:
    launcher_cls, utils = Launcher, Utils()
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=0):
        return 0

triton.runtime.driver.set_active(Driver())
from pissa_kernels.ops import dispatch
from pissa_kernels.ops.batched import Weights
from pissa_kernels.ops.triton import batched, compilation
from pissa_kernels.svd import fixed

compiled = []
triton.knobs.compilation.listener = lambda *, metadata, **_: compiled.append(metadata["name"])
dispatch.bodies = lambda weights: batched
weight, plan = torch.randn(512, 384).bfloat16(), fixed.schedule(384, 32)
fixed._compile(weight, 32, plan, ahead=True)
ahead, loaded_ahead, launched_ahead = len(compiled), len(loaded), len(launched)
fixed.solve([weight], 32, tol=0.0, seed=0)
print(json.dumps([ahead, loaded_ahead, launched_ahead, len(compiled), len(launched), sorted(set(compiled))]))
"""


@pytest.mark.slow
def test_every_kernel_of_the_schedule_is_compiled_and_loaded_before_the_first_launch(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ahead, loaded, launched_ahead, compiled, launched, names = json.loads(done.stdout.splitlines()[-1])
    assert launched_ahead == 0
    assert ahead == loaded > 20
    assert compiled == ahead, "a kernel was compiled at its first launch"
    assert launched > ahead
    assert {"diagonalize", "update", "inverse_cholesky_kernel", "product_of_panels_3", "split_kernel"} <= set(names)


class Kernel:
    """A stand-in for a Triton kernel."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.calls.append(("launch", grid, args, options))

    def warmup(self, *args: Any, grid: Any, **options: Any) -> Any:
        self.calls.append(("warmup", grid, args, options))
        return {(1, 1, 1): None}


def test_a_dry_run_collects_each_variant_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "INTERPRETED", False)
    kernel, x = Kernel(), torch.zeros(4)

    def work() -> None:
        for size in (16, 32, 17, 1):  # divisible by 16 twice
            compilation.launch(kernel, (2,), x, size, BLOCK=8)
        compilation.launch(kernel, (2,), x, 16, BLOCK=16)
        compilation.launch(kernel, (2,), None, 16, BLOCK=16)

    compilation.compile_ahead(work, torch.device("cpu"))
    assert [kind for kind, *_ in kernel.calls] == ["warmup"] * 5
    assert sorted(str(args[1]) for _, _, args, _ in kernel.calls) == ["1", "16", "16", "16", "17"]
    kernel.calls.clear()
    work()
    assert [kind for kind, *_ in kernel.calls] == ["launch"] * 6


def test_an_exception_of_the_dry_run_ends_the_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "INTERPRETED", False)
    kernel = Kernel()

    def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compilation.compile_ahead(fails, torch.device("cpu"))
    compilation.launch(kernel, (1,), 3)
    assert [kind for kind, *_ in kernel.calls] == ["launch"]
