"""The right of a process to write into the folder of a run, which it loses when the others go on without it.

When a process of several is lost, the others end, and a run that resumes may start on any host while the lost one is
only paused. Its files are open, so nothing in the file system keeps it from writing. Hence it asks before each write:

- whether the contact with the other processes has been unbroken for the last seconds, which costs next to nothing;
- whether the folder still has the number of its run, which costs opening a small file. Every run of several processes
  writes a number of its own there before anything else, and so does a run of one process that resumes it.

What remains is a single call of the system: a process that is paused between the question and its write goes through
with that write, which has at most the bytes of one tensor. They differ from what the other run writes only if the kinds
of their CPUs differ. The kernel of a host that was cut off may write its cached pages back later too. So a run that
several hosts have written to hashes every tensor again before it is published.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files.atomic import RESUMABLE, write_text
from ..runtime.contact import ProcessLost

RUN = "run.json"


class Fence:
    """What a process asks before it writes.

    Args:
        folder: folder of the run.
        text: contents of :data:`RUN`; None for a run of one process, which has the lock of the folder.
        check: raises ProcessLost if the process has lost contact.
    """

    def __init__(self, folder: Path, text: str | None = None, check: Callable[[], None] = lambda: None) -> None:
        self.folder, self.text, self.in_contact = folder, text, check

    def __call__(self) -> None:
        """Return if this process may write.

        Raises:
            ProcessLost: the message says why not.
        """
        self.in_contact()
        if self.text is None:
            return
        try:
            found = (self.folder / RUN).read_text(encoding="utf-8")
        except FileNotFoundError:
            found = ""
        if found != self.text:
            raise ProcessLost(f"another run has taken over {self.folder}, and this process writes nothing more")


def run_record(folder: Path, hosts: Sequence[str]) -> tuple[str, bool]:
    """Begin a run of several processes, or one that resumes such a run.

    Args:
        folder: folder of the run.
        hosts: names of the machines that it runs on.

    Returns:
        The contents of :data:`RUN`, and whether runs on more than one machine have written to the folder.
    """
    everyone = sorted({*hosts, *_read(folder).get("hosts", [])})
    record = {"run": secrets.token_hex(16), "hosts": everyone, "host": socket.gethostname(), "pid": os.getpid()}
    text = json.dumps(record) + "\n"
    write_text(folder / RUN, text, suffix=RESUMABLE)
    return text, len(everyone) > 1


def first_process(folder: Path) -> str:
    """Host and id of the process that holds the lock of the folder, for a message; empty if it is not known."""
    record = _read(folder)
    return f"host {record['host']}, pid {record['pid']}" if {"host", "pid"} <= record.keys() else ""


def _read(folder: Path) -> dict[str, Any]:
    """The record of the last run of several processes; empty if there was none."""
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return {**record, "hosts": [str(host) for host in record["hosts"]]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):  # its contents had not reached the disk
        return {"hosts": ["unknown"]}
