"""Sharded weights over nccl: one process on one GPU, and two on two."""

from __future__ import annotations

import pytest
import torch

from ..support.together import assert_holds, cases
from . import sharded_cases


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "world"), cases(sharded_cases))
def test_processes_with_a_gpu_each(name: str, world: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices; torch sees {torch.cuda.device_count()}")
    assert_holds(sharded_cases, name, world)
