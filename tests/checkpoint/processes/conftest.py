"""Fixtures of the tests of several processes: a checkpoint, what one process makes of it, and a folder for others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.run import run_job

from ...support.checkpoints import small, untimed
from ...support.crashing import OPTIONS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the results, and everything that one process writes to it."""
    out = tmp_path_factory.mktemp("results") / "out"
    run_job(plan_checkpoint(model, out, OPTIONS), progress=False)
    return out, untimed(out.parent)


@pytest.fixture
def out(expected: tuple[Path, dict[str, Any]]) -> Path:
    for path in expected[0].parent.iterdir():
        shutil.rmtree(path)
    return expected[0]
