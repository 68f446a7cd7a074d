"""Steps that other commands and the tests do."""

from __future__ import annotations

from typing import Any

import torch

from ..__main__ import main as bench
from ..harness.paths import ROOT
from .record import Recorder

# Suite and cases of the step "engine".
ENGINE = {
    "cuda": ("engine", r"-(mix|power)-r(16|128|256)-.*/(ours pissa|peft pissa_niter_4)$"),
    "cpu": ("small", r"^tiny-64x64"),
}


def engine(recorder: Recorder) -> None:
    """``bench engine`` on some of its synthetic weights; its rows are in a file of their own."""
    settings = recorder.settings
    suite, only = ENGINE[settings.device]
    options = ["--device", settings.device, "--only", only, "--repeats", "3", "--no-memory"]
    status = bench([suite, *options, "--out", str(settings.folder / "engine.jsonl")])
    recorder.row(f"bench {suite}", "step", reason=f"exit status {status}" if status else None)


class Outcomes:
    """Plugin of pytest: a row for each test that fails, and the number of tests with each outcome."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self.recorder.row(report.nodeid, "pytest", reason=message.strip()[:300] or "failed")
        if report.failed or report.skipped or report.when == "call":
            self.counts[report.outcome] += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.recorder.row(report.nodeid, "pytest", reason=f"cannot be collected: {report.longrepr!s:.300}")


def tests(recorder: Recorder) -> None:
    """tests/gpu, and those of the backends, which run on GPU tensors where there is a GPU."""
    import pytest

    outcomes = Outcomes(recorder)
    folders = ["tests/gpu", "tests/ops/test_backends.py"] if recorder.settings.device == "cuda" else ["tests/gpu"]
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *(str(ROOT / folder) for folder in folders)]
    status = int(pytest.main(arguments, plugins=[outcomes]))
    # 1: tests failed, which have rows
    recorder.row("pytest", "step", reason=None if status in (0, 1) else f"exit status {status}", **outcomes.counts)


def search(recorder: Recorder) -> None:
    """The search of ``bench search``, for which the file in the folder of the run is the result."""
    if recorder.settings.device != "cuda":
        recorder.row("bench search", "step", skipped="needs a GPU")
        return
    from pissa_kernels.ops.triton import launch

    from .search import Search

    path = recorder.settings.folder / f"{launch.architecture(torch.device('cuda', 0))}.json"
    recorder.row("bench search", "step", entries=Search("cuda").run(path))
