"""The log of a run: everything that is printed, without the host's name and paths."""

from __future__ import annotations

import io
import re
import socket
import sys
from pathlib import Path
from typing import TextIO

from ..harness.paths import ROOT

# An absolute path, at the start of a word or after a compiler's -I or -L.
ABSOLUTE = re.compile(r"(?:(?<![\w./~])|(?<=-[IL]))/(?:[\w.+@-]+/)*([\w.+@-]+)/?")


def scrubbed(text: str) -> str:
    """Text without the host's name and paths; only the last part of an absolute path remains."""
    for path, name in ((str(ROOT), "."), (str(Path.home()), "~"), (sys.prefix, "PREFIX")):
        text = text.replace(path, name)
    host = re.escape(socket.gethostname())
    return ABSOLUTE.sub(r"…/\1", re.sub(rf"(?<![\w-]){host}(?![\w-])", "HOST", text))


class Log(io.TextIOBase):
    """A stream that writes to the terminal, and scrubbed to a file."""

    def __init__(self, file: TextIO, terminal: TextIO) -> None:
        self.file = file
        self.terminal = terminal
        self._line = ""

    def write(self, text: str) -> int:
        self.terminal.write(text)
        # a path may arrive in two parts, so that only whole lines are scrubbed
        *lines, self._line = (self._line + text).split("\n")
        self.file.writelines(scrubbed(line) + "\n" for line in lines)
        return len(text)

    def flush(self) -> None:
        self.terminal.flush()
        self.file.flush()
