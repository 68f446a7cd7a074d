"""Processes that share a checkpoint produce the bytes of one process, fail together, and any number can resume."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.run import run_job

from ...support.checkpoints import untimed
from ...support.crashing import KILLED, OPTIONS, Child, Processes, outcomes, start
from ...support.marks import slow_but
from ...support.refusing import edit_tensor

ROOT = Path(__file__).resolve().parents[3]
# Slow enough that every process has something to do.
PACED = Processes(pace=0.05)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_write_the_bytes_of_one(
    world: int, model: Path, expected: tuple[Path, dict[str, Any]], out: Path
) -> None:
    children = start(model, out, world, processes=PACED)
    assert [child.ended() for child in children] == [0] * world
    for _, steps in outcomes(children):
        assert "journal" in steps, "every process has a share"
    assert untimed(out.parent) == expected[1]


SLOW = """
import os, pathlib, sys, time
from pissa_kernels.checkpoint import worker
from pissa_kernels.cli.main import main

run = worker.Worker.run

def slowly(*arguments):
    record = run(*arguments)
    pathlib.Path(sys.argv[1], f"pid-{os.getpid()}").touch()
    time.sleep(60)
    return record

worker.Worker.run = slowly
main(["init", *sys.argv[2:], "--rank", "4"])
"""


@pytest.mark.slow
def test_killed_torchrun_leaves_no_process(
    model: Path, expected: tuple[Path, dict[str, Any]], out: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "slow.py")]
    arguments = [sys.executable, *command, str(tmp_path), str(model), str(out)]
    torchrun = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        pids = wait_for(lambda: [int(path.name[4:]) for path in tmp_path.glob("pid-*")], 2, seconds=120)
    finally:
        torchrun.kill()
        torchrun.wait()
    wait_for(lambda: [pid for pid in pids if is_running(pid)], 0, seconds=20)
    run_job(plan_checkpoint(model, out, OPTIONS), resume=True, progress=False)
    assert untimed(out.parent) == expected[1]


def wait_for(found: Callable[[], list[int]], count: int, seconds: float) -> list[int]:
    ends = time.monotonic() + seconds
    while len(values := found()) != count:
        assert time.monotonic() < ends, f"{values} after {seconds} s"
        time.sleep(0.1)
    return values


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie that waits for its parent; with threads that end, it has its files."""
    states = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                states.append(Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()[0])
    return any(state not in "ZX" for state in states)


@pytest.mark.slow
def test_torchrun(model: Path, expected: tuple[Path, dict[str, Any]], out: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pissa_kernels", "init"]
    done = subprocess.run(
        [sys.executable, *command, str(model), str(out), "--rank", "4"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("its adapter in") == 1, "one process prints"
    assert untimed(out.parent) == expected[1]


def test_three_processes_resume_the_run_of_one(model: Path, expected: tuple[Path, dict[str, Any]], out: Path) -> None:
    first = Child(model, out, workers=1, step=("journal", 3))
    assert first.ended() == KILLED
    children = start(model, out, 3)
    assert [child.ended() for child in children] == [0, 0, 0]
    assert untimed(out.parent) == expected[1]


def test_error_of_one_process_ends_all(
    model: Path, expected: tuple[Path, dict[str, Any]], out: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    children = start(broken, out, 2)
    assert all(child.ended() == 0 for child in children)
    (out / "mine").touch()
    children = start(model, out, 2, resume=False)
    assert [child.ended() for child in children] == [1, 1]
    first, second = outcomes(children)
    assert "exists and is not an empty folder" in first
    assert second == f"RuntimeError: process 0: {first.partition(': ')[2]}"


@pytest.mark.parametrize("process", slow_but([0, 1], 1))
def test_refused_weight_of_one_process_leaves_nothing(process: int, model: Path, out: Path, tmp_path: Path) -> None:
    """The process that meets the weight names it, whichever it is, and the others end with it."""
    spoiled = Path(shutil.copytree(model, tmp_path / "model"))
    tensor = [tensor for tensor in plan_checkpoint(model, out, OPTIONS).tensors if tensor.target is not None][-1]
    assert tensor.target is not None
    edit_tensor(spoiled, tensor.info.name, lambda weight: weight * float("nan"))
    killed = start(spoiled, out, 2, {1 - process: ("journal", 0)}, processes=PACED)
    assert [child.ended() for child in killed][1 - process] == KILLED
    assert (out.parent / ".out.unfinished").exists()
    # the other process has its first tensor in work until this one has come to the last target
    paces = [Processes(pace=0.0 if rank == process else 2.0, computing=True) for rank in range(2)]
    children = start(spoiled, out, 2, processes=paces)
    assert [child.ended() for child in children] == [1, 1]
    found = outcomes(children)
    assert found[process].startswith(f"ValueError: layer '{tensor.target.name}'")
    assert found[1 - process] == f"RuntimeError: process {process}: {found[process].partition(': ')[2]}"
    assert list(out.parent.iterdir()) == []


def test_lock_of_another_run_ends_all_processes(model: Path, out: Path) -> None:
    folder = out.parent / ".out.unfinished"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    children = start(model, out, 2)
    assert [child.ended() for child in children] == [1, 1]
    os.close(descriptor)
    first, second = outcomes(children)
    assert first == f"RuntimeError: another process is writing {out}"
    assert second == f"RuntimeError: process 0: another process is writing {out}"
