"""The run of everything that needs a GPU, with steps that take no time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.initializers.suites import SUITES
from bench.tools import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["gpu", "search"])
def test_without_a_gpu_one_line_says_so(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bench", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"bench {command}: torch finds no CUDA device"]


def test_a_red_step_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = (
        gpu.Step("fails", gpu.python("-c", "import sys; print('before'); sys.exit(3)"), 20),
        gpu.Step("hangs", gpu.python("-c", "import time; time.sleep(60)"), 1),
        gpu.Step(
            "works", gpu.python("-c", "import os; print(os.getcwd(), os.environ['WORD'])"), 20, (("WORD", "yes"),)
        ),
    )
    log = tmp_path / "gpu.log"
    assert not gpu.run(steps, log)
    text = log.read_text()
    assert "before" in text
    assert "hangs: stopped after 1 s" in text
    assert ". yes" in text
    assert str(gpu.ROOT) not in text
    summary = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[1] for line in summary] == ["RED", "RED", "green"]
    assert gpu.run(steps[2:], log)


def test_the_log_names_no_host_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.socket, "gethostname", lambda: "node-7")
    line = f"node-7: -I/usr/local/cuda/include {gpu.ROOT}/csrc/a.cu ({Path.home()}/x) /tmp/y.o:3 at 3 GB/s, a/b node-77"
    expected = "HOST: -I…/include ./csrc/a.cu (~/x) …/y.o:3 at 3 GB/s, a/b node-77"
    assert gpu.scrubbed(line) == expected


def test_the_gpu_run_takes_less_than_eight_minutes() -> None:
    assert sum(step.limit for step in (gpu.BUILD, *gpu.STEPS)) <= 480


def test_without_real_weights_the_other_steps_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, notes = gpu.without_real_weights(gpu.STEPS)
    assert [step.name for step in steps] == ["tests", "kernels", "engine", "first calls"]
    assert [note.split(",")[0] for note in notes] == [
        "engine: cases with real weights are skipped",
        "real model: skipped",
    ]
    option, pattern = steps[2].command[-2:]
    assert option == "--only"
    kept = [case for case in SUITES["engine"].cases if re.search(pattern, f"{case.name}/ours pissa")]
    assert kept == [case for case in SUITES["engine"].cases if not case.source]
    log = tmp_path / "gpu.log"
    assert gpu.run((), log, notes)
    assert log.read_text().splitlines()[:2] == capsys.readouterr().out.splitlines()[:2] == notes


def test_without_the_package_the_run_leaves_real_weights_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "minilm_file", lambda: None)
    monkeypatch.setattr(gpu, "run", lambda steps, notes: ran.append((steps, notes)) or True)
    assert main(["gpu"]) == 0
    [(steps, notes)] = ran
    assert "real model" not in [step.name for step in steps]
    assert len(notes) == 2
