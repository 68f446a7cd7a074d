"""Free memory, with a GPU's figures made up."""

from __future__ import annotations

import pytest
import torch

from pissa_kernels.runtime import memory


def test_what_torch_has_cached_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20_000)
    assert memory.free(device) == 40_000


def test_free_memory_of_the_cpu() -> None:
    assert memory.free(torch.device("cpu")) > 1 << 20
