"""The examples in the docstrings of the core modules run and print what they show."""

from __future__ import annotations

import doctest
import importlib

import pytest

EXAMPLES = {
    "adapter.names": {"own_name"},
    "svd.truncated": {"truncated_svd"},
    "svd.result": {"Certificate", "TruncatedSVD"},
    "pissa": {"decompose"},
    "numerics": {"exact_arithmetic"},
    "checks": {"layer_context", "parse_init"},
    "ops": {"backend", "matmul", "normal", "orthonormalize", "rmatmul", "subtract_lowrank_", "transpose_cast"},
}


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_in_docstrings(module: str) -> None:
    name = f"pissa_kernels.{module}"
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name)
    with_examples = {test.name.removeprefix(f"{name}.") for test in found if test.examples}
    assert EXAMPLES[module] <= with_examples
    for test in found:
        test.globs.clear()  # an example imports what it uses
        result = doctest.DocTestRunner(verbose=False).run(test)
        assert result.failed == 0, test.name
