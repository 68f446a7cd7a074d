"""Models that are sharded before the adapter is made: FSDP2, tensor parallelism, and both."""

from __future__ import annotations

import pytest

from ...support.together import assert_holds, cases
from . import sharded_cases


@pytest.mark.parametrize(("name", "world"), cases(sharded_cases))
def test_several_processes(name: str, world: int) -> None:
    assert_holds(sharded_cases, name, world)
