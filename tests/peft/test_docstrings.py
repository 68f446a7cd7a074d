"""The examples in the docstrings of the public functions."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("patch", "patch_peft"),
        ("patch", "unpatch_peft"),
        ("initialize", "pissa_init"),
        ("save", "save_pissa"),
        ("original", "original_model"),
    ],
)
def test_an_example_runs_as_shown(module: str, function: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.import_module(f"pissa_kernels.peft.{module}")
    [example] = doctest.DocTestFinder(recurse=False).find(getattr(found, function), function)
    result = doctest.DocTestRunner().run(example)
    assert result.attempted > 3
    assert result.failed == 0, capsys.readouterr().out
