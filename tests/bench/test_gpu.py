"""The run of everything that a GPU can show: the whole program on a CPU, and steps that fail, hang or crash."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from bench.__main__ import main
from bench.gpu import log, others, profiled, run, steps
from bench.gpu.record import ROWS, Recorder, Settings
from bench.gpu.steps import STEPS, Step
from bench.gpu.worker import Worker
from bench.harness.paths import ROOT
from bench.harness.rows import Row, read_rows

SMALL = ["--device", "cpu", "--layers", "1", "--width", "256", "--inner", "512", "--ranks", "16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["gpu", "search"])
def test_without_a_gpu_one_line_says_so(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bench", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"bench {command}: torch finds no CUDA device"]


def on_a_cpu(out: Path, *options: str) -> list[Row]:
    """Rows of a whole run, all of them ok."""
    command = [sys.executable, "-m", "bench", "gpu", *SMALL, *options, "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = read_rows(out / ROWS)
    assert all(row["ok"] for row in rows)
    return rows


@pytest.mark.slow
def test_steps_in_processes_of_their_own(tmp_path: Path) -> None:
    rows = on_a_cpu(tmp_path, "--steps", "smoke,search")
    assert list(dict.fromkeys(row["step"] for row in rows)) == ["smoke", "search"]


@pytest.mark.slow
def test_the_whole_program_on_a_cpu(tmp_path: Path) -> None:
    rows = on_a_cpu(tmp_path, "--in-process")
    assert list(dict.fromkeys(row["step"] for row in rows)) == list(STEPS)
    for row in rows:
        assert {"gpu", "driver", "cuda"} <= row["machine"].keys()
        assert {"torch", "triton"} <= row["versions"].keys()
    ours = [row for row in rows if row["step"] == "resident" and row["provider"] == "ours pissa"]
    assert {row["layers"] for row in ours} == {1}
    for row in ours:
        assert row["energy_deficit"] <= 1e-5
        assert row["rounding"] <= 1
        assert row["min_ms"] > 0
        assert sum(row["methods"].values()) == 7
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {ROWS, "log.txt", "profile-r16.txt", "profile-one-r16.txt", "kernels.jsonl", "engine.jsonl"}
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert str(ROOT) not in text
        assert str(tmp_path) not in text
        assert socket.gethostname() not in text


def steps_of(**functions: Any) -> dict[str, Step]:
    """A table of steps that call functions; a step's limit is a minute."""

    class Given(Step):
        def load(self) -> Any:
            return functions[self.name]

    return {name: Given(name, "", 60, f"is {name}") for name in functions}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    def given(**functions: Any) -> None:
        for module in (run, steps):
            monkeypatch.setattr(module, "STEPS", steps_of(**functions))

    return given


def failing(recorder: Recorder) -> None:
    recorder.row("before", "x", figure=1.5)
    raise RuntimeError(f"no such file: {ROOT}/bench/nothing")


def working(recorder: Recorder) -> None:
    recorder.row("after", "y", figures=[float("nan")])


def test_a_step_that_raises_is_red_and_the_next_one_runs(table: Any, tmp_path: Path, capsys: Any) -> None:
    table(fails=failing, works=working)
    assert main(["gpu", *SMALL, "--in-process", "--out", str(tmp_path)]) == 1
    rows = read_rows(tmp_path / ROWS)
    assert [(row["step"], row["case"], row["ok"]) for row in rows] == [
        ("fails", "before", True),
        ("fails", "fails", False),
        ("works", "after", True),
    ]
    assert rows[1]["reason"] == "raised RuntimeError: no such file: ./bench/nothing"
    assert rows[2]["figures"] == [None]
    text = (tmp_path / "log.txt").read_text()
    assert "Traceback" in text
    assert str(ROOT) not in text
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-3:-1]] == [["fails", "RED"], ["works", "green"]]


def test_no_step_begins_after_the_budget(table: Any, tmp_path: Path) -> None:
    def slow(recorder: Recorder) -> None:
        recorder.row("slow", "x")
        time.sleep(0.2)

    table(slow=slow, works=working)
    options = ["--in-process", "--minutes", "0.002", "--out", str(tmp_path)]
    assert main(["gpu", *SMALL, *options]) == 0
    rows = read_rows(tmp_path / ROWS)
    assert [row.get("skipped") for row in rows] == [None, "no time left"]


def worker(code: str) -> Worker:
    return Worker([sys.executable, "-uc", f"import sys, os, time; sys.stdin.readline(); print('begun'); {code}"])


@pytest.mark.parametrize(
    ("code", "limit", "failure"),
    [
        ("time.sleep(60)", 2, "stopped after 2 s"),
        ("os.kill(os.getpid(), 11)", 60, "killed by SIGSEGV"),
        ("sys.exit(3)", 60, "exit status 3"),
        ("pass", 60, None),
    ],
)
def test_why_a_worker_ended(code: str, limit: float, failure: str | None) -> None:
    output = io.StringIO()
    assert worker(code).run("smoke", Settings(out="."), limit, output) == failure
    assert output.getvalue() == "begun\n"


def test_a_worker_that_dies_is_a_red_row(table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(dies=failing, works=working)
    codes = iter(["sys.exit(3)", "pass"])
    monkeypatch.setattr(run, "Worker", lambda: worker(next(codes)))
    assert main(["gpu", *SMALL, "--out", str(tmp_path)]) == 1
    [row] = read_rows(tmp_path / ROWS)
    assert (row["step"], row["reason"]) == ("dies", "exit status 3")


def test_selected_steps_run_in_the_order_of_worth() -> None:
    assert run.parse("gpu", ["--steps", "tests,smoke"]).steps == ["smoke", "tests"]
    for options in (["--steps", "smoke,no"], ["--width", "100"], ["--layers", "0"], ["--ranks", "8192"]):
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()):
            run.parse("gpu", options)
        assert stop.value.code == 2


def test_the_log_names_no_host_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.socket, "gethostname", lambda: "node-7")
    line = f"node-7: -I/usr/local/cuda/include {ROOT}/csrc/a.cu ({Path.home()}/x) /tmp/y.o:3 at 3 GB/s, a/b node-77"
    expected = "HOST: -I…/include ./csrc/a.cu (~/x) …/y.o:3 at 3 GB/s, a/b node-77"
    assert log.scrubbed(line) == expected
    terminal, file = io.StringIO(), io.StringIO()
    stream = log.Log(file, terminal)
    for part in (line[:12], line[12:], "\n"):
        stream.write(part)
    assert (terminal.getvalue(), file.getvalue()) == (line + "\n", expected + "\n")


@pytest.mark.slow
def test_a_run_that_is_terminated_leaves_no_worker(tmp_path: Path) -> None:
    code = "import sys; from bench.gpu import run, worker; COMMAND; sys.exit(run.main('gpu', sys.argv[1:]))"
    sleeper = "[sys.executable, '-uc', 'import os, time; print(os.getpid()); time.sleep(60)']"
    code = code.replace("COMMAND", f"run.Worker = lambda: worker.Worker({sleeper})")
    command = [sys.executable, "-uc", code, *SMALL, "--steps", "smoke", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        sleeping = next(int(line) for line in program.stdout if line.strip().isdigit())
        program.terminate()
        assert program.wait(timeout=20) == 143
    for _ in range(100):
        if not Path(f"/proc/{sleeping}").exists():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the worker is still there")


def test_events_of_a_profile_are_counted_once() -> None:
    names = {"cudaLaunchKernelExC": 2, "cuLaunchKernelEx": 3, "cudaStreamSynchronize": 5, "aten::item": 7}
    names |= {"aten::_local_scalar_dense": 7, "Memcpy DtoH (Device -> Pinned)": 11, "sm90_gemm": 13}
    found = profiled.counts(SimpleNamespace(key=key, count=count) for key, count in names.items())
    assert found == dict.fromkeys(profiled.COUNTED, 0) | {
        "launches": 5,
        "stream_waits": 5,
        "items": 7,
        "copies_to_host": 11,
    }


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder("tests", Settings(out=str(tmp_path), device="cpu"))


def test_a_test_that_fails_has_a_row(recorder: Recorder) -> None:
    outcomes = others.Outcomes(recorder)
    for outcome, when in (("passed", "setup"), ("passed", "call"), ("failed", "call"), ("skipped", "setup")):
        crash = SimpleNamespace(reprcrash=SimpleNamespace(message="assert 1 == 2\n  more"))
        report = SimpleNamespace(outcome=outcome, when=when, nodeid="tests/gpu/test_x.py::test", longrepr=crash)
        report.failed, report.skipped = outcome == "failed", outcome == "skipped"
        outcomes.pytest_runtest_logreport(report)
    assert outcomes.counts == {"passed": 1, "failed": 1, "skipped": 1}
    [row] = read_rows(recorder.settings.folder / ROWS)
    assert (row["case"], row["ok"]) == ("tests/gpu/test_x.py::test", False)
    assert row["reason"].startswith("assert 1 == 2")
