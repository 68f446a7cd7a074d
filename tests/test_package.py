"""Importing is light, and what is public is what is documented."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pissa_kernels as pk

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_import_asks_no_gpu_and_loads_neither_peft_nor_triton() -> None:
    loaded = run(
        "import torch, sys; before = set(sys.modules); import pissa_kernels; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before})); "
        "print(torch.cuda.is_initialized())"
    )
    modules, initialised = loaded.splitlines()
    assert not {"peft", "triton", "transformers", "tqdm", "safetensors"} & set(modules.split())
    assert initialised == "False"


def test_importing_sets_nothing() -> None:
    """No global flag, no patched attribute, no environment variable."""
    code = (
        "import os, torch; flags = lambda: (torch.get_float32_matmul_precision(), torch.get_num_threads(), "
        "torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ)); before = flags(); "
        "import pissa_kernels; print(before == flags())"
    )
    assert run(code) == "True"


def test_works_without_peft_and_triton() -> None:
    code = (
        "import sys; sys.modules['peft'] = sys.modules['triton'] = None; import torch, pissa_kernels as pk; "
        "d = pk.decompose(torch.randn(30, 20), 4); print(d.lora_A.shape)\n"
        "try: pk.patch_peft()\n"
        "except ImportError as error: print('ImportError')"
    )
    assert run(code).splitlines() == ["torch.Size([4, 20])", "ImportError"]


def test_public_names() -> None:
    for name in pk.__all__:
        assert getattr(pk, name).__doc__, name
    for verb in ("transpose_cast", "subtract_lowrank_", "matmul", "rmatmul", "backend"):
        assert getattr(pk.ops, verb).__doc__, verb
    assert (ROOT / "pissa_kernels" / "py.typed").is_file()
