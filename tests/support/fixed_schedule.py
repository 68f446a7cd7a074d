"""The fixed schedule of GPUs, on CPU tensors."""

from __future__ import annotations

import pytest

from pissa_kernels.svd import fixed
from pissa_kernels.svd.machines import MACHINES


@pytest.fixture
def fixed_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on the CPU go through the fixed schedule, and their workspace is the schedule's."""
    monkeypatch.setattr(fixed, "DEVICES", tuple(key for key in MACHINES if key.startswith("cpu")))
