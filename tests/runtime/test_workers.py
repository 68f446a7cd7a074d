"""Jobs on threads: what is passed on, and what happens after a failure."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

import pytest

from pissa_kernels.runtime import workers
from pissa_kernels.runtime.contact import ProcessLost
from pissa_kernels.runtime.workers import InOrder, left_behind, run_jobs


def test_what_is_submitted_runs_in_order_whatever_one_raises() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.002)
        done.append(number)
        if number in (1, 3):
            raise OSError(f"no room for {number}")

    def submit_all() -> None:
        with InOrder("test") as order:
            for number in range(6):
                order.submit(functools.partial(work, number))

    with pytest.raises(OSError, match="no room for 1"):
        submit_all()
    assert done == list(range(6))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pissa_kernels-test")]


def test_waiting_until_few_are_left() -> None:
    go = threading.Event()
    with InOrder("test") as order:
        order.submit(lambda: None)
        order.submit(lambda: go.wait(10) and None)
        order.wait(most=1)
        assert len(order.pending) == 1
        go.set()
        order.wait()
        assert not order.pending


def test_an_error_is_raised_by_the_next_wait_only() -> None:
    with InOrder("test") as order:
        order.submit(lambda: 1 / 0 and None)  # type: ignore[func-returns-value]
        with pytest.raises(ZeroDivisionError):
            order.wait()
        order.wait()


@pytest.mark.parametrize("error", [ValueError("first"), KeyboardInterrupt()])
def test_after_an_error_of_done_no_job_is_started(error: BaseException) -> None:
    started: list[int] = []
    stop = threading.Event()

    def job(number: int) -> None:
        started.append(number)
        time.sleep(0.002)

    def done(number: int) -> None:
        raise error

    jobs = [lambda emit, number=number: (job(number), emit(number)) for number in range(50)]
    with pytest.raises(type(error)):
        run_jobs(jobs, 1, done, stop)  # type: ignore[arg-type]
    assert len(started) < 50
    assert stop.is_set()


@pytest.mark.parametrize("finishes", [True, False])
def test_a_lost_process_ends_the_work_within_seconds(finishes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that finish in time are passed on; one that takes longer is left behind."""
    monkeypatch.setattr(workers, "FINISH_SECONDS", 1.0)
    started, go, found = threading.Event(), threading.Event(), []

    def job(emit: Callable[[int], None]) -> None:
        started.set()
        go.wait(0.4 if finishes else 30)
        emit(7)

    def check() -> None:
        if started.is_set():
            raise ProcessLost("process 1 was killed")

    began = time.monotonic()
    with pytest.raises(ProcessLost, match="process 1 was killed"):
        run_jobs([job], 1, found.append, check=check)
    assert time.monotonic() - began < 5
    assert found == ([7] if finishes else [])
    assert left_behind() is not finishes
    go.set()
    ends = time.monotonic() + 5
    while left_behind():
        assert time.monotonic() < ends
