"""The examples in docstrings run and print what they show."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import pissa_kernels as pk

PACKAGE = Path(pk.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
# what functions return: their examples show it
RETURNED = {"CheckpointReport", "ConversionReport", "Decomposition", "Finding", "PatchedPeft", "Verification"}


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:torch")
@pytest.mark.parametrize("module", MODULES)
def test_examples_run_as_shown(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module), module)
    examples = [test for test in found if test.examples]
    assert examples
    for test in examples:
        test.globs.clear()  # a user who runs an example does not have the names of its module
        with contextlib.redirect_stderr(sys.stdout):  # where what fails is captured with its example
            assert doctest.DocTestRunner(verbose=False).run(test).failed == 0, test.name


@pytest.mark.parametrize("names", [pk, pk.ops], ids=["pissa_kernels", "ops"])
def test_everything_public_has_an_example(names: object) -> None:
    public = {name: getattr(names, name) for name in names.__all__}  # type: ignore[attr-defined]
    documented = {name: inspect.getdoc(thing) or "" for name, thing in public.items() if callable(thing)}
    assert {name for name, text in documented.items() if ">>> " not in text and "See :func:" not in text} <= RETURNED
