"""Shared setup: no network, no chatter, and the reason why GPU tests do not run."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .support.interpreter import convert_as_hardware

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed logs what it finds when transformers imports it
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


@pytest.fixture(scope="session")
def written(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What init makes of it at rank 4, not to be written to."""
    import pissa_kernels as pk

    out = tmp_path_factory.mktemp("written") / "out"
    pk.init_checkpoint(pristine, out, rank=4, progress=False)
    return out


@pytest.fixture(scope="module")
def one_thread_and_few_collections() -> Iterator[None]:
    """The demo collects garbage before it measures time; without torch's and transformers' modules that is quick."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil, in a folder of its own."""
    return Path(shutil.copytree(pristine, tmp_path / "source" / "model"))
