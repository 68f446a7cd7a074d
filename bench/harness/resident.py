"""The resident set of this process, and its peak during one run.

Only the standard library is imported, so that a process can be measured before it imports anything else. The peak is
VmHWM from /proc, not ``ru_maxrss``: after a fork, ``ru_maxrss`` starts from the parent's value.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path


def peak_of(run: Callable[[], object]) -> float | None:
    """MiB by which the resident set of this process grows during ``run``; None where VmHWM cannot be reset."""
    if not _reset_peak():
        return None
    resident = status_mib("VmRSS")
    run()
    return status_mib("VmHWM") - resident


def _reset_peak() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def status_mib(field: str) -> float:
    """A size from /proc/self/status, such as "VmRSS", in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {field}"
    return int(found[1]) / 1024
