"""A pytest plugin that puts the hook in place under somebody else's tests, and says how much it did."""

from __future__ import annotations

from typing import Any

import pissa_kernels as pk

_report = pk.patch_peft()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"pissa_kernels initialised {len(_report.layers)} layers")
