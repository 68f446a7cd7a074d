"""Runs in processes of their own that die on the way.

They are forked from a server that has all imports behind it, so that hundreds of them take seconds.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (so that the server has it, and what follows)
import torch
import tqdm
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from pissa_kernels.checkpoint.journal import Journal
from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.run import run_job
from pissa_kernels.checkpoint.targets import AdapterOptions

OPTIONS = AdapterOptions(rank=4)
KILLED = -signal.SIGKILL
PATIENCE = 120.0
tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
get_checkpoint_conversion_mapping("llama")  # takes longer than a run, and is kept: once in the server
# Whatever of the file system a run changes, it does through one of these, or through its journal.
STEPS = (
    *((os, name) for name in ("posix_fallocate", "pwritev", "replace", "fsync", "mkdir", "unlink", "rmdir", "chmod")),
    (shutil, "copyfile"),
)

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


class Child:
    """A run in a process of its own: ``init``, resumed if there is something to resume.

    Args:
        model, out: as on the command line.
        environment: of the process.
        changes: arguments of ``init_checkpoint``.
        step: die at this step (see :data:`STEPS`), counted from 0; None for an undisturbed run.
        torn: do half of a write before dying, where the step is one.
    """

    def __init__(
        self,
        model: Path,
        out: Path,
        environment: Mapping[str, str] | None = None,
        *,
        step: int | None = None,
        torn: bool = False,
        options: AdapterOptions = OPTIONS,
        **changes: Any,
    ) -> None:
        self._here, there = _processes.Pipe()
        arguments = (there, model, out, dict(environment or {}), step, torn, options, {"resume": True, **changes})
        self._process = _processes.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        there.close()

    def begun(self) -> None:
        """Wait until all is planned, and nothing written."""
        assert self._here.poll(PATIENCE)
        assert self._here.recv() == "begun"

    def kill(self) -> None:
        self._process.kill()

    def ended(self) -> int:
        """The exit code, a signal's number negative."""
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, "it hangs"
        return self._process.exitcode

    def outcome(self) -> Any:
        """After :meth:`begun` and :meth:`ended`: (seconds, names of all steps), or the error as text."""
        return self._here.recv()


def _run(
    connection: Connection,
    model: Path,
    out: Path,
    environment: Mapping[str, str],
    fatal: int | None,
    torn: bool,
    options: AdapterOptions,
    changes: Mapping[str, Any],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    names: list[str] = []
    try:
        plan = plan_checkpoint(model, out, options)
        _count_steps(names, fatal, torn)
        connection.send("begun")
        began = time.perf_counter()
        run_job(plan, progress=False, **changes)
        connection.send((time.perf_counter() - began, names))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _count_steps(names: list[str], fatal: int | None, torn: bool) -> None:
    def step(name: str, half: Callable[[], object] | None = None) -> None:
        names.append(name)
        if len(names) - 1 == fatal:
            if torn and half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "pwritev":
                descriptor, (buffer,), offset = arguments
                step(name, lambda: function(descriptor, [buffer[: len(buffer) // 2]], offset))
            else:
                step(name)
            return function(*arguments, **options)

        return call

    for module, name in STEPS:
        setattr(module, name, counted(name, getattr(module, name)))
    plain = Journal.open

    def journal(self: Journal, rank: int) -> Any:
        return _Journal(plain(self, rank), step)

    Journal.open = journal  # type: ignore[method-assign]


class _Journal:
    """A journal whose lines are steps."""

    def __init__(self, file: Any, step: Callable[..., None]) -> None:
        self._file, self._step = file, step

    def write(self, text: str) -> None:
        def half() -> None:
            self._file.write(text[: len(text) // 2])
            self._file.flush()

        self._step("journal", half)
        self._file.write(text)

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
