"""Jobs on worker threads, with their results passed to the calling thread as they are emitted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def run_jobs(
    jobs: Sequence[Callable[[Callable[[T], None]], None]],
    workers: int,
    done: Callable[[T], None],
    stop: threading.Event | None = None,
) -> None:
    """Run jobs and pass what they emit to ``done``. After the first failure no job is started.

    Args:
        jobs: functions of one argument, ``emit``, which they may call any number of times.
        workers: number of threads.
        done: called in the calling thread, in the order in which results are emitted.
        stop: set after a failure, for jobs that check it while they run; None for none.

    Raises:
        BaseException: the first that a job or ``done`` raised, KeyboardInterrupt included. Jobs that were running are
            finished first, and what they emitted has been passed to ``done``.
    """
    finished: SimpleQueue[tuple[T] | Future[None]] = SimpleQueue()

    def emit(value: T) -> None:
        finished.put((value,))

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="pissa_kernels") as pool:
        try:
            for job in jobs:
                pool.submit(job, emit).add_done_callback(finished.put)
            left = len(jobs)
            while left:
                item = finished.get()
                if isinstance(item, Future):
                    left -= 1
                    item.result()
                else:
                    done(*item)
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
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
