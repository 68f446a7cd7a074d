"""A process that is killed, stopped or cut off ends the run of all with one message, and writes nothing afterwards."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.run import run_job

from ...support.checkpoints import small, untimed
from ...support.crashing import KILLED, OPTIONS, Child, Processes, start
from ...support.kills import kill
from ...support.marks import slow_but

ROOT = Path(__file__).resolve().parents[3]
ADVICE = "; finished tensors are kept, and --resume continues with any number of processes"
# rmdir is left out: at the end of a run, it is tried on a folder that it may have made and that may be empty
WRITES = ("pwritev", "journal", "write_text", "copyfile", "replace", "unlink")
LIMIT = 2.0
# Seven seconds of work for two processes.
SLOW = Processes(limit=LIMIT, pace=1.0, computing=True)


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    """Not even a stopped one, for whose end pytest would wait."""
    yield
    for child in multiprocessing.active_children():
        child.kill()


def at_work(children: list[Child], out: Path, seconds: float = 1.5) -> None:
    """Wait until the tensors are in work."""
    for child in children:
        child.begun()
    ends = time.monotonic() + 60
    while not (out.parent / ".out.unfinished" / "run.json").exists():
        assert time.monotonic() < ends
        time.sleep(0.05)
    time.sleep(seconds)


@pytest.mark.parametrize("killed", slow_but([0, 1, 2], 1))
def test_killed_process_is_named_and_one_process_resumes(
    killed: int, model: Path, expected: tuple[Path, dict[str, Any]], out: Path
) -> None:
    hosts = ["a", "b", "c"]
    children = start(model, out, 3, {killed: ("journal", 1)}, hosts, Processes(limit=20.0, pace=0.4))
    began = time.monotonic()
    codes = [child.ended() for child in children]
    assert codes == [KILLED if rank == killed else 1 for rank in range(3)]
    assert time.monotonic() - began < 20, "a connection that closes is noticed before the limit"
    assert not out.exists()
    names = {tensor.info.name for tensor in plan_checkpoint(model, out, OPTIONS).tensors}
    for rank in {0, 1, 2} - {killed}:
        _, text, _ = children[rank].outcomes()
        who = f"ProcessLost: process {killed} (host {hosts[killed]}, pid {children[killed].pid}) was killed, or its"
        assert text.startswith(who)
        assert text.endswith(f" in work{ADVICE}")
        assert any(f"with {name}" in text for name in names), text
    outcome = run_job(plan_checkpoint(model, out, OPTIONS), resume=True, progress=False)
    assert outcome.kept >= 2
    assert untimed(out.parent) == expected[1]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_stopped_process_writes_nothing_when_it_wakes(
    stopped: int, model: Path, expected: tuple[Path, dict[str, Any]], out: Path
) -> None:
    """Its host vanishes for the others, and comes back while a run of three processes resumes."""
    children = start(model, out, 2, hosts=["a", "b"], processes=SLOW)
    at_work(children, out)
    children[stopped].signal(signal.SIGSTOP)
    began = time.monotonic()
    assert children[1 - stopped].ended() == 1
    assert time.monotonic() - began < LIMIT + 8, "the limit, the tensor in work, and the news"
    text, _ = children[1 - stopped].outcomes()
    silent = f"process {stopped} (host {'ab'[stopped]}, pid {children[stopped].pid}) has not been heard of for 2 s"
    assert text.startswith(f"ProcessLost: {silent} (paused, or the host or its network is down), with ")
    assert text.endswith(f" in work{ADVICE}")
    if stopped == 0:  # it holds the lock
        (refused,) = start(model, out, 1)
        assert refused.ended() == 1
        held = f"another process is writing {out} (host a, pid {children[0].pid}); end that process if it hangs"
        assert refused.outcomes()[1] == f"RuntimeError: {held}"
        resumed = []
    else:
        resumed = start(model, out, 3, hosts=["a", "b", "c"], processes=SLOW)
        at_work(resumed, out, 0.5)
    woken = time.monotonic()
    children[stopped].signal(signal.SIGCONT)
    assert children[stopped].ended() == 1
    assert time.monotonic() - woken < 10
    text, times = children[stopped].outcomes()
    assert text.startswith("ProcessLost: ")
    assert [name for at, name in times if at > woken and name in WRITES] == []
    resumed = resumed or start(model, out, 3, hosts=["a", "b", "c"])
    assert [child.ended() for child in resumed] == [0, 0, 0]
    assert untimed(out.parent) == expected[1]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [[0], [1], [0, 1, 2]])
def test_run_goes_on_after_a_pause(
    stopped: list[int], model: Path, expected: tuple[Path, dict[str, Any]], out: Path
) -> None:
    """Of a process for less than the limit, or of all of them for longer, as by Ctrl-Z."""
    children = start(model, out, 3, processes=Processes(limit=4.0, pace=1.5, computing=True))
    at_work(children, out, 1.0)
    for rank in stopped:
        children[rank].signal(signal.SIGSTOP)
    time.sleep(3.0 if len(stopped) == 1 else 6.0)
    for rank in stopped:
        children[rank].signal(signal.SIGCONT)
    assert [child.ended() for child in children] == [0, 0, 0]
    assert untimed(out.parent) == expected[1]


@pytest.mark.slow
def test_process_in_a_long_computation_is_not_lost(
    model: Path, expected: tuple[Path, dict[str, Any]], out: Path
) -> None:
    children = start(model, out, 2, processes=Processes(limit=1.0, pace=4.0, computing=True), workers=4)
    assert [child.ended() for child in children] == [0, 0]
    assert untimed(out.parent) == expected[1]


@pytest.mark.parametrize("ended", slow_but([0, 1], 1))
def test_sigterm_of_one_process_ends_all(
    ended: int, model: Path, expected: tuple[Path, dict[str, Any]], out: Path
) -> None:
    children = start(model, out, 2, hosts=["a", "b"], processes=SLOW)
    at_work(children, out)
    children[ended].signal(signal.SIGTERM)
    assert [child.ended() for child in children] == [1, 1]
    for child in children:
        text, _ = child.outcomes()
        assert text.startswith(
            f"ProcessLost: process {ended} (host {'ab'[ended]}, pid {children[ended].pid}) was asked"
        )
        assert text.endswith(f" in work{ADVICE}")
    run_job(plan_checkpoint(model, out, OPTIONS), resume=True, progress=False)
    assert untimed(out.parent) == expected[1]


PACED_CLI = """
import os, pathlib, sys, time
from pissa_kernels.checkpoint import worker
from pissa_kernels.cli.main import command
from pissa_kernels.runtime import contact, workers

run = worker.Worker.run
seconds = float(sys.argv.pop(1))
workers.FINISH_SECONDS = 2.0

def slowly(*arguments):
    pathlib.Path(sys.argv[1], f"{os.environ['RANK']}-{os.getpid()}").touch()
    time.sleep(seconds)
    return run(*arguments)

worker.Worker.run = slowly
raise SystemExit(command(["init", *sys.argv[2:], "--rank", "4", "--workers", "1"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 300.0])
def test_torchrun_with_a_killed_process(
    seconds: float, model: Path, expected: tuple[Path, dict[str, Any]], out: Path, tmp_path: Path
) -> None:
    """Each process says in one line what has happened, also one that has a computation of minutes in work."""
    (tmp_path / "paced.py").write_text(PACED_CLI)
    (tmp_path / "pids").mkdir()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(tmp_path / "paced.py")]
    arguments = [sys.executable, *command, str(seconds), str(tmp_path / "pids"), str(model), str(out)]
    with (tmp_path / "stderr").open("w+") as stderr:
        torchrun = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=stderr)
        try:
            ends = time.monotonic() + 120
            while len(found := list((tmp_path / "pids").iterdir())) < 3:
                assert time.monotonic() < ends
                time.sleep(0.1)
            time.sleep(1.5)
            victim = random.Random(0).choice(sorted(found)).name
            os.kill(int(victim.partition("-")[2]), signal.SIGKILL)
            killed = time.monotonic()
            assert torchrun.wait(60) == 1
            assert time.monotonic() - killed < 20
        finally:
            torchrun.kill()
            torchrun.wait()
        stderr.seek(0)
        lines = [line for line in stderr if line.startswith("pissa-kernels: error: ")]
    assert len(lines) == 2
    for line in lines:
        assert f"error: process {victim.partition('-')[0]} (host " in line
        assert line.endswith(f" in work{ADVICE}\n")
    run_job(plan_checkpoint(model, out, OPTIONS), resume=True, progress=False)
    assert untimed(out.parent) == expected[1]


@pytest.mark.slow
def test_random_kills(tmp_path: Path) -> None:
    """``python -m tests.support.kills`` does more of them."""
    (tmp_path / "results").mkdir()
    kills = kill(small(tmp_path / "model"), tmp_path / "results" / "out", count=8, seed=3)
    assert kills.killed.total() >= 8
