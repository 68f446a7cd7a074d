"""Runs in child processes that are killed on the way.

The children are forked from a server that has imported everything, so that hundreds of them take seconds.
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

import peft  # noqa: F401  (imported by the server, as is what follows)
import torch
import tqdm
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from pissa_kernels.checkpoint.journal import Journal
from pissa_kernels.checkpoint.options import AdapterOptions
from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.quantization import QuantizationOptions
from pissa_kernels.checkpoint.run import run_job

OPTIONS = AdapterOptions(rank=4)
KILLED = -signal.SIGKILL
TIMEOUT_SECONDS = 120.0
tqdm.tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore of the system, which a killed process leaves behind
get_checkpoint_conversion_mapping("llama")  # cached; it takes longer than a run
# The calls through which a run changes the file system. A journal line is one more step.
STEPS = (
    *((os, name) for name in ("posix_fallocate", "pwritev", "replace", "fsync", "mkdir", "unlink", "rmdir", "chmod")),
    (shutil, "copyfile"),
    (Path, "write_text"),
)
# Steps that a process can be killed in the middle of.
TORN = ("pwritev", "journal", "copyfile", "write_text")

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


class Child:
    """``init_checkpoint`` in a child process, resuming what there is to resume.

    Args:
        model, out: as on the command line.
        environment: variables of the child's environment.
        step: the step before which the child is killed, by its number, or by its name and the number among those of its
            name, as in ("journal", 2) for the third journal line; None for a run that ends by itself.
        torn: kill the child in the middle of the step, where it is one of :data:`TORN`.
        options, quantize: options of the adapter, and of the quantization.
        changes: arguments of ``run_job``.
    """

    def __init__(
        self,
        model: Path,
        out: Path,
        environment: Mapping[str, str] | None = None,
        *,
        step: int | tuple[str, int] | None = None,
        torn: bool = False,
        options: AdapterOptions = OPTIONS,
        quantize: QuantizationOptions | None = None,
        **changes: Any,
    ) -> None:
        self._here, there = _processes.Pipe()
        settings = (options, quantize, {"resume": True, **changes})
        arguments = (there, model, out, dict(environment or {}), step, torn, *settings)
        self._process = _processes.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        there.close()

    def begun(self) -> None:
        """Wait for the plan, before anything is written."""
        assert self._here.poll(TIMEOUT_SECONDS)
        assert self._here.recv() == "begun"

    def kill(self) -> None:
        self._process.kill()

    def ended(self) -> int:
        """Wait for the end. Returns the exit code, which is negative for a signal."""
        self._process.join(TIMEOUT_SECONDS)
        assert self._process.exitcode is not None, "the child hangs"
        return self._process.exitcode

    def outcome(self) -> Any:
        """After :meth:`begun` and :meth:`ended`: (seconds, names of all steps), or the error as text."""
        return self._here.recv()


def _run(
    connection: Connection,
    model: Path,
    out: Path,
    environment: Mapping[str, str],
    fatal: int | tuple[str, int] | None,
    torn: bool,
    options: AdapterOptions,
    quantize: QuantizationOptions | None,
    changes: Mapping[str, Any],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    names: list[str] = []
    try:
        job = plan_checkpoint(model, out, options, quantize=quantize)
        _count_steps(names, fatal, torn)
        connection.send("begun")
        began = time.perf_counter()
        run_job(job, progress=False, **changes)
        connection.send((time.perf_counter() - began, names))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _count_steps(names: list[str], fatal: int | tuple[str, int] | None, torn: bool) -> None:
    def step(name: str, half: Callable[[], object] | None = None) -> None:
        number = (name, names.count(name)) if isinstance(fatal, tuple) else len(names)
        names.append(name)
        if number == fatal:
            if torn and half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            step(name, functools.partial(_half, name, function, *arguments) if name in TORN else None)
            return function(*arguments, **options)

        return call

    for module, name in STEPS:
        setattr(module, name, counted(name, getattr(module, name)))
    open_journal = Journal.open

    def open_counted(self: Journal, process: int) -> Any:
        return _Journal(open_journal(self, process), step)

    Journal.open = open_counted  # type: ignore[method-assign]


def _half(name: str, function: Callable[..., Any], first: Any, second: Any, *others: Any) -> None:
    """The first half of a step."""
    if name == "pwritev":
        function(first, [second[0][: len(second[0]) // 2]], *others)
    elif name == "write_text":
        function(first, second[: len(second) // 2])
    else:  # copyfile
        content = Path(first).read_bytes()
        Path(second).write_bytes(content[: len(content) // 2])


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
