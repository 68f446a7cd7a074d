"""A process for one step. It is started one step ahead, so that its imports take no time of the budget.

``python -m bench.gpu.worker`` reads the step and the settings from its standard input, as one line of JSON. Until then
it does not touch the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TextIO

from ..harness.paths import ROOT
from .record import Settings
from .steps import STEPS, run_step

COMMAND = (sys.executable, "-u", "-m", __name__)


class Worker:
    """The parent's side."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        # a session of its own, so that its children can be killed with it
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.stopped = False

    def run(self, step: str, settings: Settings, limit: float, log: TextIO) -> str | None:
        """Run a step with its output in ``log``; why it did not come to its end, or None."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(limit, self.stop)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
                stdin.write(json.dumps([step, dataclasses.asdict(settings)]) + "\n")
            for line in self.process.stdout:
                log.write(line)
                log.flush()
            status = self.process.wait()
        finally:
            timer.cancel()
            self.kill()
        if self.stopped:
            return f"stopped after {limit:.0f} s"
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}" if status else None

    def stop(self) -> None:
        """Kill the process because its time is up."""
        self.stopped = True
        self.kill()

    def kill(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def main() -> None:
    for module in {step.function.partition(":")[0] for step in STEPS.values()}:
        with contextlib.suppress(ImportError):  # the step that needs it says so
            importlib.import_module(f"{__package__}.{module}")
    line = sys.stdin.readline()
    if line:
        step, settings = json.loads(line)
        run_step(step, Settings(**settings | {"ranks": tuple(settings["ranks"])}))


if __name__ == "__main__":
    main()
