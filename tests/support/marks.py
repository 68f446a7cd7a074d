"""Which tests ``pytest -m "not slow"`` leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Values of a parameter, all of them slow except for some that stand for the others."""
    values = list(values)
    assert set(fast) <= set(values)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
