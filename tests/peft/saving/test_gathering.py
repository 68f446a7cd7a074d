"""A model that two processes hold together is saved whole, merged, or refused: FSDP, ZeRO-3, tensor parallelism."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import pissa_kernels as pk

from ...support.adapted import moved
from ...support.gathering import ADAPTER, RESIDUAL, TRAINED, WAYS, logits
from ...support.marks import slow_but
from ...support.models import build

ROOT = Path(__file__).resolve().parents[3]
# Of float32 in these models, in another order of sums.
ROUNDING = 5e-6


@pytest.mark.parametrize("way", slow_but(sorted(WAYS), "fsdp2"))
def test_what_two_processes_save_loads_in_one(way: str, tmp_path: Path) -> None:
    if way in ("zero3", "modifier_rank") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    folder = tmp_path / "folder"
    folder.mkdir()
    _run(way, folder)
    base = build("llama")
    if way == "checkpointed":
        base.lm_head.weight = base.model.embed_tokens.weight
    original = logits(base)
    if (folder / RESIDUAL).exists():
        residual = type(base).from_pretrained(folder / RESIDUAL)
        loaded = peft.PeftModel.from_pretrained(residual, folder / RESIDUAL / "pissa_init").eval()
        assert moved(original, logits(residual.eval())) <= ROUNDING
        report = pk.Report.read(folder / RESIDUAL / "pissa_init" / "pissa_report.json")
        assert {layer.name for layer in report.layers} == set(_names(base))
        with loaded.disable_adapter():
            assert moved(original, logits(loaded)) > 1e-2
    if (folder / ADAPTER).exists():
        trained = torch.load(folder / TRAINED)
        assert moved(original, trained) > 1e-2
        with pk.patch_peft(progress=False) as report:
            loaded = peft.PeftModel.from_pretrained(base, folder / ADAPTER).eval()
        assert {layer.name for layer in report.layers} == set(_names(build("llama")))
        assert moved(trained, logits(loaded)) <= ROUNDING


def _names(base: torch.nn.Module) -> list[str]:
    return [name for name, module in base.named_modules() if name.endswith("_proj")]


def _run(way: str, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.support.gathering", way, str(folder), "2"]
    variables = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=ROOT,
            env=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        done = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], done
    assert all(out.splitlines()[-1] == "done" for out, _ in done), done
