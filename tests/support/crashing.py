"""Runs in child processes that are killed on the way.

The children are forked from a server that has imported everything, so that hundreds of them take seconds.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (imported by the server, as is what follows)
import torch
import torch.distributed
import tqdm
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from pissa_kernels.checkpoint import worker
from pissa_kernels.checkpoint.journal import Journal
from pissa_kernels.checkpoint.options import AdapterOptions
from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.quantization import QuantizationOptions
from pissa_kernels.checkpoint.run import run_job
from pissa_kernels.runtime import contact

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


@dataclass(frozen=True)
class Processes:
    """How the processes of a run see each other.

    Attributes:
        host: name of the machine of this process; None for that of the machine.
        limit: longest silence of a process, in seconds.
        pace: seconds that each tensor takes longer.
        computing: whether these seconds are spent in C code without Python's lock, as in an SVD, before anything of the
            tensor is written; else they pass after it is written and before it is in the journal.
    """

    host: str | None = None
    limit: float = contact.LIMIT_SECONDS
    pace: float = 0.0
    computing: bool = False

    def apply(self) -> None:
        """Change what this process sees."""
        contact.LIMIT_SECONDS = self.limit
        contact.BEAT_SECONDS = min(contact.BEAT_SECONDS, self.limit / 10)
        if self.host is not None:
            socket.gethostname = lambda: str(self.host)
        run = worker.Worker.run

        def paced(*arguments: Any) -> Any:
            if self.computing:
                time.sleep(self.pace)
                return run(*arguments)
            record = run(*arguments)
            time.sleep(self.pace)
            return record

        if self.pace:
            worker.Worker.run = paced  # type: ignore[method-assign]


def start(
    model: Path,
    out: Path,
    world: int,
    fatal: Mapping[int, int | tuple[str, int]] | None = None,
    hosts: Sequence[str | None] = (),
    processes: Processes | Sequence[Processes] = Processes(),
    **changes: Any,
) -> list[Child]:
    """Start processes as torchrun does.

    Args:
        model, out, changes: as for :class:`Child`.
        world: number of processes.
        fatal: by process, the step that it is killed at.
        hosts: names of the machines of the processes; empty for that of the machine.
        processes: how they see each other otherwise, all of them or each.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    seen = [processes] * world if isinstance(processes, Processes) else processes
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Child(
            model,
            out,
            common | {"RANK": str(process), "LOCAL_RANK": str(process)},
            step=(fatal or {}).get(process),
            processes=replace(seen[process], host=hosts[process] if hosts else None),
            **{"workers": 1, **changes},
        )
        for process in range(world)
    ]


class Child:
    """``init_checkpoint`` in a child process, resuming what there is to resume.

    Args:
        model, out: as on the command line.
        environment: variables of the child's environment.
        step: the step before which the child is killed, by its number, or by its name and the number among those of its
            name, as in ("journal", 2) for the third journal line; None for a run that ends by itself.
        torn: kill the child in the middle of the step, where it is one of :data:`TORN`.
        options, quantize: options of the adapter, and of the quantization.
        processes: how the processes of a run see each other; None for what holds without tests.
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
        processes: Processes | None = None,
        **changes: Any,
    ) -> None:
        self._here, there = _processes.Pipe()
        settings = (options, quantize, processes or Processes(), {"resume": True, **changes})
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

    def signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ended(self) -> int:
        """Wait for the end. Returns the exit code, which is negative for a signal."""
        self._process.join(TIMEOUT_SECONDS)
        assert self._process.exitcode is not None, "the child hangs"
        return self._process.exitcode

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def outcomes(self) -> list[Any]:
        """After :meth:`ended`: all that the child has sent."""
        found = []
        with contextlib.suppress(EOFError):
            while self._here.poll():
                found.append(self._here.recv())
        return found

    def outcome(self) -> Any:
        """After :meth:`begun` and :meth:`ended`: (seconds, names of all steps), or the error as text.

        After an error, once more: the times of all steps, by ``time.monotonic``, with their names.
        """
        return self._here.recv()


def outcomes(children: Sequence[Child]) -> list[Any]:
    """Outcome of each child, after all have ended."""
    for child in children:
        child.ended()
    found = []
    for child in children:
        child.begun()
        found.append(child.outcome())
    return found


def _run(
    connection: Connection,
    model: Path,
    out: Path,
    environment: Mapping[str, str],
    fatal: int | tuple[str, int] | None,
    torn: bool,
    options: AdapterOptions,
    quantize: QuantizationOptions | None,
    processes: Processes,
    changes: Mapping[str, Any],
) -> None:
    os.environ.update(environment)
    processes.apply()
    torch.set_num_threads(1)
    names = _Names()
    try:
        job = plan_checkpoint(model, out, options, quantize=quantize)
        _count_steps(names, fatal, torn)
        connection.send("begun")
        began = time.perf_counter()
        run_job(job, progress=False, **changes)
        connection.send((time.perf_counter() - began, names))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        connection.send(names.times)
        raise SystemExit(1) from None


class _Names(list[str]):
    """Names of steps, with the times at which they were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[float, str]] = []

    def append(self, name: str) -> None:
        super().append(name)
        self.times.append((time.monotonic(), name))


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
