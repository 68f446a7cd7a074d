"""The package's import, and the names and signatures that other people's code may rely on."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import pissa_kernels as pk

ROOT = Path(__file__).parents[1]
NOT_LOADED = {"peft", "triton", "safetensors", "transformers", "jinja2", "matplotlib", "tqdm", "huggingface_hub"}


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_import_loads_torch_and_nothing_heavier() -> None:
    loaded = run(
        "import torch, sys; before = set(sys.modules); import pissa_kernels; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert "pissa_kernels" in loaded.split()
    assert not NOT_LOADED & set(loaded.split())


def test_import_does_not_query_a_gpu() -> None:
    code = """
import torch

def fail(*arguments, **options):
    raise AssertionError("a GPU was queried")

for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_name",
             "get_device_properties", "mem_get_info", "init", "_lazy_init"):
    assert hasattr(torch.cuda, name), name
    setattr(torch.cuda, name, fail)
import pissa_kernels
print(torch.cuda.is_initialized())
"""
    assert run(code) == "False"


def test_import_sets_nothing() -> None:
    """No global flag, no environment variable."""
    code = (
        "import os, torch; flags = lambda: (torch.get_float32_matmul_precision(), torch.get_num_threads(), "
        "torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ)); before = flags(); "
        "import pissa_kernels; print(before == flags())"
    )
    assert run(code) == "True"


@pytest.mark.slow
def test_import_patches_nothing() -> None:
    code = (
        "from peft.tuners.lora.layer import LoraLayer; before = dict(vars(LoraLayer)); "
        "import pissa_kernels; print(before == dict(vars(LoraLayer)))"
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


def test_import_works_without_fcntl() -> None:
    """Windows has no fcntl."""
    code = (
        "import torch, sys; sys.modules['fcntl'] = None; import pissa_kernels as pk, pissa_kernels.cli.main; "
        "print(pk.decompose(torch.randn(30, 20), 4).lora_A.shape)"
    )
    assert run(code) == "torch.Size([4, 20])"


REQUIRED = inspect.Parameter.empty
SIGNATURES: dict[Callable[..., Any], dict[str, Any]] = {
    pk.pissa_init: {"self": REQUIRED, "adapter_name": REQUIRED, "init_lora_weights": REQUIRED},
    pk.patch_peft: {},
    pk.unpatch_peft: {},
    pk.decompose: {
        "weight": REQUIRED, "rank": REQUIRED, "scaling": 1.0, "init": "pissa", "fan_in_fan_out": False, "seed": 0,
        "inplace": False,
    },
    pk.truncated_svd: {"weight": REQUIRED, "rank": REQUIRED, "tol": 1e-6, "niter": None, "seed": 0},
    pk.ops.transpose_cast: {"weight": REQUIRED, "dtype": REQUIRED},
    pk.ops.subtract_lowrank_: {
        "weight": REQUIRED, "lora_B": REQUIRED, "lora_A": REQUIRED, "scaling": REQUIRED, "fan_in_fan_out": False,
    },
    pk.ops.matmul: {"weight": REQUIRED, "X": REQUIRED},
    pk.ops.rmatmul: {"weight": REQUIRED, "Y": REQUIRED},
    pk.ops.backend: {"verb": REQUIRED, "weight": REQUIRED},
    pk.init_checkpoint: {"model": REQUIRED, "out": REQUIRED, "rank": 16, "target_modules": None},
    pk.verify_checkpoint: {"base": REQUIRED, "out": REQUIRED},
    pk.convert_adapter: {"trained": REQUIRED, "initial": REQUIRED, "out": REQUIRED, "rank": None, "base": None},
    pk.merge_checkpoint: {"out": REQUIRED, "trained": REQUIRED, "merged": REQUIRED, "dtype": None, "force": False},
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signature(function: Callable[..., Any]) -> None:
    """Parameters may be added, if they have a default. The promised ones keep their names, defaults and places."""
    found, promised = inspect.signature(function).parameters, SIGNATURES[function]
    assert {name: found[name].default for name in promised} == promised
    required = [name for name, default in promised.items() if default is REQUIRED]
    assert [name for name, parameter in found.items() if parameter.default is REQUIRED] == required
    assert list(found)[: len(required)] == required
    assert all(found[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in required)


FIELDS = {
    pk.Decomposition: {"lora_A", "lora_B", "residual", "singular_values", "certificate"},
    pk.TruncatedSVD: {"U", "S", "Vh", "certificate"},
    pk.Certificate: {"passes", "energy", "residual", "converged", "method"},
    pk.LayerReport: {"name", "shape", "rank", "certificate", "seconds"},
    pk.Report: {"layers"},
}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_fields(kind: Any) -> None:
    assert FIELDS[kind] <= set(get_type_hints(kind))


def test_reports() -> None:
    for kind in (pk.PatchedPeft, pk.CheckpointReport, pk.ConversionReport):
        assert issubclass(kind, pk.Report)
    assert issubclass(pk.Verification, list)
    for name in ("table", "summary", "to_dict", "to_json", "write", "from_dict", "read"):
        assert callable(getattr(pk.Report, name))
    assert callable(pk.PatchedPeft.__enter__)
    assert callable(pk.PatchedPeft.__exit__)


def test_public_names_are_documented() -> None:
    for name in pk.__all__:
        assert getattr(pk, name).__doc__, name
    for verb in ("transpose_cast", "subtract_lowrank_", "matmul", "rmatmul", "backend"):
        assert getattr(pk.ops, verb).__doc__, verb
    assert (ROOT / "pissa_kernels" / "py.typed").is_file()
