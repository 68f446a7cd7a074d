"""Functions that several processes run at the same time, connected through gloo or what their module calls ``BACKEND``.

A module of such functions marks them with :func:`together`. All of its functions for one number of processes run in one
start of these, because a start takes as long as ten of them; a pytest module reads the outcomes.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600
_MARK = "together_worlds"


def together(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Mark a function to be run by each of these numbers of processes."""

    def mark(function: Callable[[], None]) -> Callable[[], None]:
        function.__dict__[_MARK] = worlds
        return function

    return mark


def cases(module: Any) -> list[Any]:
    """A parameter of pytest for each function of a module and each number of processes."""
    return [
        pytest.param(
            name, world, id=f"{name.removeprefix('check_')}-{world}", marks=[pytest.mark.slow] if world > 2 else []
        )
        for name, function in vars(module).items()
        for world in getattr(function, _MARK, ())
    ]


def assert_holds(module: Any, name: str, world: int) -> None:
    """Fail with what the processes have raised."""
    for rank, found in enumerate(_outcomes(module.__name__, world)):
        assert found.get(name, "the process ended before") == "", f"process {rank}: {found.get(name)}\n{found.get('')}"


@cache
def _outcomes(module: str, world: int) -> list[dict[str, str]]:
    """For each process, what each function has raised; "" for nothing."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, module, folder, str(world)]
        variables = {
            "WORLD_SIZE": str(world),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "DS_ACCELERATOR": "cpu",
        }
        processes = [
            subprocess.Popen(
                [*command, str(rank)],
                cwd=ROOT,
                env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        printed = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
        found = []
        for rank, text in enumerate(printed):
            path = Path(folder, f"{rank}.json")
            found.append({"": text[-3000:]} | (json.loads(path.read_text()) if path.exists() else {}))
        return found


def main(module: str, folder: str, world: int, rank: int) -> None:
    import torch.distributed as dist

    cases = importlib.import_module(module)
    backend: str = getattr(cases, "BACKEND", "gloo")
    if backend == "nccl":
        torch.cuda.set_device(rank)
    rendezvous, timeout = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group(backend, init_method=rendezvous, world_size=world, rank=rank, timeout=timeout)
    os.environ["TOGETHER_FOLDER"] = folder
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for name, function in list(vars(cases).items()):  # a warning adds a name to a module
        if world not in getattr(function, _MARK, ()):
            continue
        try:
            function()
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
        if found[name]:
            break  # the others wait for this process, and fail
    dist.destroy_process_group()


def folder(name: str) -> Path:
    """A folder that all processes of a start have."""
    path = Path(os.environ["TOGETHER_FOLDER"], name)
    path.mkdir(exist_ok=True)
    return path


def same_everywhere(*tensors: torch.Tensor) -> None:
    """Assert that every process has the same bits."""
    import torch.distributed as dist

    mine = [tensor.detach().cpu() for tensor in tensors]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for others in found:
        assert all(
            one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(mine, others, strict=True)
        )


def raises_everywhere(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    """Assert that a call fails in every process, with the same message."""
    import torch.distributed as dist

    with pytest.raises(kind) as raised:
        call()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(raised.value))
    assert text in found[0], found[0]
    assert found == found[:1] * len(found), found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
