"""A trained adapter of a small Llama."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from .adapters import make


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("llama")
    base, adapted = make(folder)
    return folder, base, adapted


@pytest.fixture
def copied(llama: tuple[Path, Any, Any], tmp_path: Path) -> Path:
    """A copy of the same folders, for tests that change them."""
    return Path(shutil.copytree(llama[0], tmp_path / "copied"))
