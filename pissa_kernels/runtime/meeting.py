"""How the processes of a run meet: process 0 listens, and says where through the store that torchrun has started."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import secrets
import socket
from typing import Any

from .connection import Connection, Member, clock

# Processes wait for each other at the start until each has planned its work.
START_SECONDS = 600.0
# Time for one process to say who it is.
_HELLO_SECONDS = 5.0
# Each run of a job meets under other names in the store: what an earlier one has written there stays.
_runs = itertools.count()


def meet(rank: int, world: int) -> tuple[list[Member], list[Connection]]:
    """Wait for all processes.

    Args:
        rank, world: number of this process, and number of processes.

    Returns:
        The processes, and the connections of this one: in process 0 to every other, elsewhere to process 0.

    Raises:
        RuntimeError: some are not there within ten minutes; the message names them.
    """
    me = Member(rank, socket.gethostname(), os.getpid())
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    ends = clock() + START_SECONDS
    try:
        store = _store(rank, address, port)
        if rank == 0:
            return _listen(store, me, world, address, ends)
        return _connect(json.loads(store.get("process 0")), me, address, ends)
    except (OSError, RuntimeError) as error:
        if isinstance(error, _Absent):
            raise
        reason = str(error).partition("\n")[0]
        raise RuntimeError(f"{me} has not reached process 0 through {address}:{port}: {reason}") from None


class _Absent(RuntimeError):
    """Processes that have not come."""


def _store(rank: int, address: str, port: int) -> Any:
    """torchrun's store, or one in process 0 where torchrun has none."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        address,
        port,
        is_master=rank == 0 and not agent,
        timeout=datetime.timedelta(seconds=START_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"pissa_kernels/{attempt}/{next(_runs)}", store)


def _listen(store: Any, me: Member, world: int, master: str, ends: float) -> tuple[list[Member], list[Connection]]:
    token = secrets.token_hex(16)
    members, connections = {0: me}, []
    with _listener() as listener:
        where = {"addresses": [_address_towards(master), socket.gethostname()], "port": listener.getsockname()[1]}
        store.set("process 0", json.dumps({**where, "token": token}))
        while len(members) < world:
            listener.settimeout(max(0.01, ends - clock()))
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                absent = [rank for rank in range(world) if rank not in members]
                raise _Absent(
                    f"{'process' if len(absent) == 1 else 'processes'} {', '.join(map(str, absent[:8]))}"
                    f"{', …' if len(absent) > 8 else ''} of {world} did not start within {START_SECONDS:.0f} s"
                ) from None
            hello = _line(accepted)
            if hello.get("token") != token:  # something else that looks for open ports
                accepted.close()
                continue
            member = Member(hello["rank"], hello["host"], hello["pid"])
            members[member.rank] = member
            connections.append(Connection(accepted, member))
    everyone = [members[rank] for rank in range(world)]
    for connection in connections:
        connection.send({"members": [[member.rank, member.host, member.pid] for member in everyone]})
    return everyone, connections


def _connect(where: dict[str, Any], me: Member, master: str, ends: float) -> tuple[list[Member], list[Connection]]:
    failure: OSError = ConnectionError("no address")
    for address in (*where["addresses"], master):
        try:
            connected = socket.create_connection((address, where["port"]), timeout=_HELLO_SECONDS)
        except OSError as error:
            failure = error
            continue
        hello = {"token": where["token"], "rank": me.rank, "host": me.host, "pid": me.pid}
        connected.sendall(json.dumps(hello).encode() + b"\n")
        if answer := _line(connected, ends):
            members = [Member(*member) for member in answer["members"]]
            return members, [Connection(connected, members[0])]
        failure = ConnectionError(f"{address}:{where['port']} gives no answer")
        connected.close()
    raise failure


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 is switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _address_towards(host: str) -> str:
    """The address of this machine in the network of a host. Nothing is sent."""
    with contextlib.suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return host


def _line(connected: socket.socket, ends: float | None = None) -> dict[str, Any]:
    """One line of JSON; empty if none comes. No byte after it is read."""
    data = b""
    with contextlib.suppress(OSError, ValueError):
        while not data.endswith(b"\n"):
            connected.settimeout(_HELLO_SECONDS if ends is None else max(0.01, ends - clock()))
            byte = connected.recv(1)
            if not byte or len(data) > 1 << 20:
                return {}
            data += byte
        found = json.loads(data)
        return found if isinstance(found, dict) else {}
    return {}
