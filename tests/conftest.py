"""Shared setup: no network, no chatter, and the reason why GPU tests do not run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from .support.interpreter import convert_as_hardware

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    convert_as_hardware()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is visible to torch"))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, not to be written to."""
    from .support.checkpoints import small

    return small(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil, in a folder of its own."""
    return Path(shutil.copytree(pristine, tmp_path / "source" / "model"))
