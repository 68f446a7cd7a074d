"""Jobs on worker threads, with their results passed to the calling thread as they are emitted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Empty, SimpleQueue
from typing import TypeVar

from .contact import ProcessLost

T = TypeVar("T")
# Time between two calls of ``check``.
CHECK_SECONDS = 0.25
# Time that running jobs have to finish once a process is lost. An SVD may take much longer.
FINISH_SECONDS = 12.0
_left_behind: list[Future[None]] = []


def left_behind() -> bool:
    """Whether threads still run that nobody waits for, because another process was lost."""
    return any(not future.done() for future in _left_behind)


def run_jobs(
    jobs: Sequence[Callable[[Callable[[T], None]], None]],
    workers: int,
    done: Callable[[T], None],
    stop: threading.Event | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Run jobs and pass what they emit to ``done``. After the first failure no job is started.

    Args:
        jobs: functions of one argument, ``emit``, which they may call any number of times.
        workers: number of threads.
        done: called in the calling thread, in the order in which results are emitted.
        stop: set after a failure, for jobs that check it while they run; None for none.
        check: called in the calling thread while jobs run, to raise what ends them; None for nothing.

    Raises:
        BaseException: the first that a job, ``done`` or ``check`` raised, KeyboardInterrupt included. Jobs that were
            running are finished first, and what they emitted has been passed to ``done``. After a ProcessLost, they
            have :data:`FINISH_SECONDS` for that; where one still runs then, :func:`left_behind` holds.
    """
    finished: SimpleQueue[tuple[T] | Future[None]] = SimpleQueue()
    futures: list[Future[None]] = []

    def emit(value: T) -> None:
        finished.put((value,))

    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="pissa_kernels")
    try:
        for job in jobs:
            futures.append(pool.submit(job, emit))
            futures[-1].add_done_callback(finished.put)
        left = len(jobs)
        while left:
            try:
                item = finished.get(timeout=None if check is None else CHECK_SECONDS)
            except Empty:
                assert check is not None
                check()
                continue
            if isinstance(item, Future):
                left -= 1
                item.result()
            else:
                done(*item)
        pool.shutdown()
    except BaseException as error:
        if stop is not None:
            stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        running = [future for future in futures if not future.done()]
        _left_behind.extend(wait(running, FINISH_SECONDS if isinstance(error, ProcessLost) else None).not_done)
        while not finished.empty():
            if not isinstance(item := finished.get(), Future):
                with contextlib.suppress(Exception):
                    done(*item)
        raise


class InOrder:
    """Context with a thread that runs functions one after another, all of them, whatever one of them raises.

    Args:
        name: of the thread.

    Raises:
        BaseException: at the end of the context, the first that a function has raised.
    """

    def __init__(self, name: str) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=f"pissa_kernels-{name}")
        self.pending: list[Future[None]] = []

    def __enter__(self) -> InOrder:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()
        self.wait()

    def submit(self, work: Callable[[], None]) -> None:
        """Run ``work`` after all that was submitted before. Raises nothing that earlier work has raised."""
        self.pending.append(self.pool.submit(work))

    def wait(self, most: int = 0) -> None:
        """Wait until at most ``most`` functions are left, and raise what one of the others has raised."""
        while len(self.pending) > most:
            self.pending.pop(0).result()
