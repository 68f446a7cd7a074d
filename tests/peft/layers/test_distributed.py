"""Several processes compute the same bits."""

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

from ...support.adapted import config
from ...support.marks import slow_but
from ...support.models import build
from ...support.processes import WAYS, digest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("way", slow_but(sorted(WAYS), "partitioned"))
def test_two_processes_agree_with_each_other_and_with_one(way: str, tmp_path: Path) -> None:
    if way == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed; [partitioned] simulates its gather without it")
    command = [sys.executable, "-m", "tests.support.processes", way, str(tmp_path / "rendezvous"), "2"]
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=ROOT,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], done
    seen = {word for out, _ in done for word in out.splitlines()[-1].split()}
    with pk.patch_peft():
        alone = peft.get_peft_model(build("llama", torch.bfloat16), config("llama"))
    assert seen == {digest(alone)}
