"""The contact between processes, here between threads of one: claims, agreement, silence, and the news of a loss."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pissa_kernels.runtime import connection, contact
from pissa_kernels.runtime.connection import Connection, Member
from pissa_kernels.runtime.contact import Contact, ProcessLost


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(contact, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(contact, "NEWS_SECONDS", 0.3)


class Net:
    """Processes in contact. The first ``alive`` are contacts, the others sockets that say nothing."""

    def __init__(self, world: int, alive: int) -> None:
        self.members = [Member(rank, f"host{rank}", 1000 + rank) for rank in range(world)]
        pairs = [tcp_pair() for _ in range(world - 1)]
        first, *others = self.members
        hub = Contact(0, self.members, [Connection(here, one) for one, (here, _) in zip(others, pairs, strict=True)])
        ends = [there for _, there in pairs]
        contacts = [
            Contact(one.rank, self.members, [Connection(ends[one.rank - 1], first)]) for one in others[: alive - 1]
        ]
        self.contacts, self.ends = [hub, *contacts], ends

    def all(self, call: Callable[[Contact], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.contacts)) as pool:
            return list(pool.map(call, self.contacts))


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = socket.create_connection(server.getsockname())
        return server.accept()[0], there


@pytest.fixture
def net() -> Iterator[Callable[..., Net]]:
    made = []

    def make(world: int, alive: int | None = None) -> Net:
        made.append(Net(world, world if alive is None else alive))
        return made[-1]

    yield make
    for one in made:
        one.all(lambda member: member.leave(None))
        for end in one.ends:
            end.close()


def lost(member: Contact, seconds: float = 5.0) -> str:
    """What is lost, once a check says so."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            member.check()
        except ProcessLost as error:
            return str(error)
        time.sleep(0.01)
    raise AssertionError("nothing is lost")


def test_values_of_all_in_order(net: Callable[..., Net]) -> None:
    three = net(3)
    for turn in range(20):
        found = three.all(lambda member, turn=turn: member.gather([turn, str(member._me), None]))  # type: ignore[misc]
        assert found == [[[turn, str(member), None] for member in three.members]] * 3


def test_each_number_is_claimed_once(net: Callable[..., Net]) -> None:
    three = net(3)
    found = three.all(lambda member: [member.claim() for _ in range(200)])
    assert sorted(number for numbers in found for number in numbers) == list(range(600))
    assert all(numbers == sorted(numbers) for numbers in found)
    assert three.contacts[0].taken_elsewhere() == 400
    assert three.contacts[0].taken_elsewhere() == 0
    three.contacts[1].close_claims()
    ends = time.monotonic() + 5
    while three.contacts[2].claim() < 1 << 60:
        assert time.monotonic() < ends


def test_no_loss_while_all_are_there(net: Callable[..., Net]) -> None:
    two = net(2)
    ends = time.monotonic() + 2.5  # more than two limits
    while time.monotonic() < ends:
        two.all(Contact.check)
        time.sleep(0.05)


@pytest.mark.parametrize("closed", [True, False])
def test_a_lost_process_is_named_to_all(closed: bool, net: Callable[..., Net]) -> None:
    """With what it has in work, whether its connection closes or it falls silent."""
    three = net(3, alive=2)
    waiting = ThreadPoolExecutor(1).submit(three.contacts[1].gather, 1)
    three.ends[1].sendall(b'{"beat": 1, "seen": 0, "doing": ["a", "b", "c", "d", "e"]}\n')
    time.sleep(0.2)
    three.all(Contact.check)
    began = time.monotonic()
    if closed:
        three.ends[1].shutdown(socket.SHUT_RDWR)
    found = {lost(member) for member in three.contacts}
    seconds = time.monotonic() - began
    how = (
        "was killed, or its connection was cut"
        if closed
        else ("has not been heard of for 1 s (paused, or the host or its network is down)")
    )
    assert found == {f"process 2 (host host2, pid 1002) {how}, with a, b, c and 2 more in work"}
    assert seconds < 0.5 if closed else 0.5 < seconds < 2.5
    with pytest.raises(ProcessLost):
        waiting.result(5)
    with pytest.raises(ProcessLost):
        three.contacts[1].claim()


def test_processes_of_one_host_are_lost_together(net: Callable[..., Net]) -> None:
    five = net(6, alive=1)
    text = lost(five.contacts[0])
    assert text.startswith("process 1 (host host1, pid 1001), process 2 (host host2, pid 1002), process 3 (")
    assert " and 2 more processes have not been heard of for 1 s" in text


def test_process_0_is_lost(net: Callable[..., Net]) -> None:
    two = net(2)
    two.contacts[0].doing = ["lm_head.weight"]
    time.sleep(0.4)
    two.contacts[0]._stopping.set()
    assert lost(two.contacts[1]).startswith("process 0 (host host0, pid 1000) has not been heard of for 1 s")
    assert lost(two.contacts[1]).endswith("with lm_head.weight in work")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_check_after_a_pause_waits_for_the_others(
    rank: int, net: Callable[..., Net], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was confirmed before the pause does not count, even if nobody has said anything."""
    two = net(2)
    two.all(Contact.check)
    contact_ = two.contacts[rank]
    confirmed = contact_._connections[0].confirmed
    contact_._connections[0].confirmed = confirmed - 10  # as if the clock had gone on by that
    contact_._connections[0]._sent.clear()  # beats sent before the pause
    began = time.monotonic()
    contact_.check()
    assert contact_._connections[0].confirmed > confirmed
    assert time.monotonic() - began < 0.6


def test_a_check_after_a_pause_that_was_too_long_fails(net: Callable[..., Net]) -> None:
    two = net(2, alive=1)
    two.contacts[0]._connections[0].confirmed -= 10
    with pytest.raises(ProcessLost, match=r"^process 1 "):
        two.contacts[0].check()


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("error", "words"), [(KeyboardInterrupt(), "was interrupted"), (OSError("x"), "failed: x")])
def test_an_error_that_nobody_knows_ends_all(
    rank: int, error: BaseException, words: str, net: Callable[..., Net]
) -> None:
    three = net(3)
    leaving = threading.Thread(target=three.contacts[rank].leave, args=(error,))
    leaving.start()
    for other in {0, 1, 2} - {rank}:
        assert lost(three.contacts[other]) == f"{three.members[rank]} {words}"
    leaving.join(5)


def test_clock_goes_on() -> None:
    before = connection.clock()
    time.sleep(0.01)
    assert connection.clock() > before
