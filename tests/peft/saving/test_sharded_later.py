"""Models that are sharded after the adapter is made, and checkpoints of sharded models."""

from __future__ import annotations

import pytest

from ...support.together import assert_holds, cases
from . import sharded_later_cases


@pytest.mark.parametrize(("name", "world"), cases(sharded_later_cases))
def test_several_processes(name: str, world: int) -> None:
    assert_holds(sharded_later_cases, name, world)
