"""What the processes of a run exchange, here in one process."""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

import pytest

from pissa_kernels.runtime import distributed, meeting
from pissa_kernels.runtime.contact import ProcessLost
from pissa_kernels.runtime.distributed import ProcessGroup, joined


class OfTwo(ProcessGroup):
    """Process 1 of two; the other one sends ``received``."""

    received: Any = ""

    def __init__(self, received: Any = "") -> None:
        super().__init__(rank=1, world=2)
        object.__setattr__(self, "received", received)
        object.__setattr__(self, "sent", [])

    def gather(self, value: Any) -> list[Any]:
        self.sent.append(value)  # type: ignore[attr-defined]
        return [self.received, value]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as group:
        assert (group.rank, group.world, group.first) == (0, 1, True)
        assert group.gather("value") == ["value"]
        assert group.hosts() == [socket.gethostname()]
        assert [group.claim() for _ in range(3)] == [0, 1, 2]
        group.check()
        group.tell(["lm_head.weight"])
        group.close_claims()
        assert group.taken_elsewhere() == 0


def test_an_error_in_another_process_is_raised_here() -> None:
    with pytest.raises(RuntimeError, match=r"^process 0: no room$"), OfTwo("no room").together():
        pass
    with OfTwo().together():
        pass


@pytest.mark.parametrize(("error", "sent"), [(OSError("no room"), "no room"), (AssertionError(), "AssertionError")])
def test_an_error_here_is_sent_and_raised(error: Exception, sent: str) -> None:
    group = OfTwo()
    with pytest.raises(type(error)) as raised, group.together():
        raise error
    assert raised.value is error
    assert group.sent == [sent]  # type: ignore[attr-defined]


def test_an_error_here_is_raised_even_if_another_process_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(value: Any) -> list[Any]:
        raise ProcessLost("process 0 was killed")

    group = OfTwo()
    object.__setattr__(group, "gather", gather)
    with pytest.raises(OSError, match="no room"), group.together():
        raise OSError("no room")
    with pytest.raises(ProcessLost), group.together():
        pass


@pytest.fixture
def one_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is process 0 of three, of which no other one comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"WORLD_SIZE": 3, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("one_of_three")
def test_processes_that_do_not_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "START_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match=r"^processes 1, 2 of 3 did not start within 1 s$"), joined():
        pass


@pytest.mark.usefixtures("one_of_three")
def test_process_0_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "START_SECONDS", 1.0)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match=r"^process 1 \(host .*\) has not reached process 0 through 127"), joined():
        pass


def test_sigterm_is_told_and_restored() -> None:
    class Told:
        asked = 0

        def ask_to_end(self) -> None:
            self.asked += 1

    told = Told()
    with distributed._sigterm_told_to(told):  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
    assert told.asked == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
