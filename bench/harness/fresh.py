"""Call a function in a fresh process whose allocator returns freed memory to the system.

Peak memory is the peak of the resident set during a run minus the resident set before it (:mod:`.resident`). Two
things would hide or inflate it:

- glibc keeps freed memory, which stays resident, so that a later allocation from it does not show. The process runs
  with MALLOC_MMAP_THRESHOLD_ fixed: every block of 128 KiB or more, in whichever arena, is mapped on its own and
  unmapped when it is freed. malloc_trim returns smaller blocks before the measurement;
- the first use of an operation loads code and starts thread pools. The functions called here therefore first run on a
  small weight; the run that is measured is the first large one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .paths import ROOT

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
P = ParamSpec("P")
T = TypeVar("T")


def call(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """The result of a module's function, called in a fresh process.

    Args:
        function: function at the top of a module; its result must be JSON.
        arguments: positional arguments, JSON.
        keywords: keyword arguments, JSON.

    Raises:
        subprocess.CalledProcessError: the process failed; ``stderr`` contains its traceback.
    """
    command = [sys.executable, "-m", __name__, function.__module__, function.__qualname__]
    command += [json.dumps(arguments), json.dumps(keywords)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | MALLOC, capture_output=True, text=True, check=True)
    result: T = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """The child of :func:`call`: MODULE FUNCTION ARGUMENTS KEYWORDS, the last two as JSON."""
    module, function, arguments, keywords = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(*json.loads(arguments), **json.loads(keywords))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
