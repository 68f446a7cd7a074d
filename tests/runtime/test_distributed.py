"""What the processes of a run exchange, here in one process."""

from __future__ import annotations

from typing import Any

import pytest

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
        assert not group.on_several_hosts()


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
