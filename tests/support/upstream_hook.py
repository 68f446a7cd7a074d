"""A pytest plugin that runs tests under the hook and reports the number of layers that it initialized."""

from __future__ import annotations

from typing import Any

import pissa_kernels as pk

_report = pk.patch_peft()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"pissa_kernels initialized {len(_report.layers)} layers")
