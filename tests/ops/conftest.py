"""Fixtures for the tests of the faster backends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.ops import dispatch

from ..support.backends import DEVICE, FASTER


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that an element that no kernel writes is found."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=FASTER)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the faster backends, forced."""
    name: str = request.param
    force(name, "transpose_cast", DEVICE, monkeypatch)
    return name


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    force("triton", "matmul", DEVICE, monkeypatch)


@pytest.fixture
def csrc_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    force("csrc", "matmul", "cpu", monkeypatch)


def force(name: str, verb: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force a backend, or skip the test with the backend's reasons against it."""
    reasons = pk.ops.unsupported_reasons(verb, torch.ones(2, 2, device=device))[name]
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    monkeypatch.setenv(dispatch.VARIABLE, name)
