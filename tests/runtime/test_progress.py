"""The progress bar: what it shows on a terminal, and that it shows nothing elsewhere."""

from __future__ import annotations

import io
import sys
import time

import pytest

from pissa_kernels.runtime import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# tqdm draws no more often than every 0.1 s
PAUSE = 0.12


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time from which the bar computes the speed, in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress, "perf_counter", lambda: now[0])
    return now


def test_on_a_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress(3, "initializing") as tick:
        clock[0] = 2.0
        time.sleep(PAUSE)
        tick("model.layers.0.q_proj", 3_000_000_000)
        clock[0] = 4.0
        time.sleep(PAUSE)
        tick("model.layers.1.q_proj", 1_000_000_000)
        time.sleep(PAUSE)
        tick("lm_head", 0)
    shown = terminal.getvalue()
    assert "initializing: 100%" in shown
    assert "1/3" in shown
    assert "1.50 GB/s, model.layers.0.q_proj" in shown
    assert "1.00 GB/s, model.layers.1.q_proj" in shown
    assert "3/3" in shown
    assert shown.rpartition("\r")[0].endswith(" "), "the bar is cleared at the end"


def test_no_speed_without_bytes(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress(1, "reading") as tick:
        time.sleep(PAUSE)
        tick("before the clock moves", 10)
        clock[0] = 1.0
    assert "before the clock moves" in terminal.getvalue()
    assert "GB/s" not in terminal.getvalue()


def test_nothing_is_shown_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress(2, "initializing") as tick:
        tick("q", 1)
        tick("k", 1)
    assert capsys.readouterr() == ("", "")


def test_nothing_is_shown_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.progress(1, "initializing") as tick:
        tick("q", 1)
    assert terminal.getvalue() == ""
    with pytest.raises(KeyError) as raised, progress.progress(1, "initializing"):
        raise KeyError("error of the work")
    assert raised.value.__context__ is None, "the missing package is not the cause"


def test_an_error_of_the_work_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="error of the work"), progress.progress(1, "initializing"):
        raise ValueError("error of the work")
