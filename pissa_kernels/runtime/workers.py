"""Jobs on threads, their results handed to the caller's own thread as they come."""

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
    """Run the jobs, telling ``done`` of what they emit. After the first failure nothing new is begun.

    Args:
        jobs: each is given a function to emit with, as often as it likes.
        workers: threads.
        done: called in this thread, in the order of the emissions.
        stop: set at a failure, for jobs that look at it.

    Raises:
        BaseException: the first that a job or ``done`` raised, an interrupt included; what was emitted by the jobs that
            were under way then has been handed to ``done`` all the same.
    """
    finished: SimpleQueue[tuple[T] | Future[None]] = SimpleQueue()

    def emit(value: T) -> None:
        finished.put((value,))

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="pissa_kernels") as pool:
        futures = [pool.submit(job, emit) for job in jobs]
        for future in futures:
            future.add_done_callback(finished.put)
        left = len(futures)
        try:
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
