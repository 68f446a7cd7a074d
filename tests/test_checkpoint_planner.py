"""The process that asks transformers and PEFT: it answers as they do here, and its end is nobody's trouble."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.checkpoint import commands
from pissa_kernels.checkpoint import planner as planner_module
from pissa_kernels.checkpoint.planner import Planner
from pissa_kernels.checkpoint.targets import Adapter, AdapterOptions, find_targets
from pissa_kernels.files.folder import open_checkpoint

from .checkpoints import save, small, tied_llama
from .refusing import init, refused
from .test_checkpoint_refusals import edit_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands plan in a process of its own, whatever threads the tests run beside."""
    monkeypatch.setattr(commands, "may_fork", lambda: True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return small(tmp_path / "source" / "model")


def asked(model: Path, options: AdapterOptions) -> Adapter | Exception:
    try:
        with Planner(open_checkpoint(model), options) as planner:
            return planner.adapter()
    except Exception as error:
        return error
    finally:
        assert multiprocessing.active_children() == []


def test_the_answer_is_find_targets(model: Path) -> None:
    options = AdapterOptions(rank=4, rank_pattern={"q_proj": 2})
    assert asked(model, options) == find_targets(open_checkpoint(model), options)


SPOILT: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "tied": (lambda model: save(tied_llama(), model), {"target_modules": ("lm_head",)}),
    "quantised": (lambda model: edit_config(small(model), quantization_config={"quant_method": "gptq"}), {}),
    "unknown class": (lambda model: edit_config(small(model), architectures=["NoSuchModel"]), {}),
    "unknown type": (lambda model: edit_config(small(model), model_type="no_such_type"), {}),
    "nothing": (small, {"target_modules": ("nope",)}),
    "a bad pattern": (small, {"target_modules": ("(",)}),
    "rank": (small, {"rank": 17}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_refusal_is_the_same(what: str, tmp_path: Path) -> None:
    spoil, changes = SPOILT[what]
    spoil(tmp_path / "model")
    options = AdapterOptions(**{"rank": 4, **changes})
    with pytest.raises(Exception) as here:  # noqa: PT011
        find_targets(open_checkpoint(tmp_path / "model"), options)
    there = asked(tmp_path / "model", options)
    assert isinstance(there, Exception)
    assert isinstance(here.value, type(there))
    assert str(there) == str(here.value)
    assert "find_targets" in str(there.__cause__), "a developer sees where it was raised"


class Foreign(FileNotFoundError):
    """Of a class that pickle does not make again."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (Foreign("one", "two"), FileNotFoundError, "one and two"),
        (ValueError(lambda: None), RuntimeError, "<function"),
        (OSError(28, "No space left on device", "file"), OSError, "[Errno 28] No space left on device: 'file'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"), UnicodeDecodeError, "can't decode byte 0xff"),
    ],
    ids=["foreign", "no pickle", "errno", "four arguments"],
)
def test_any_exception_arrives(
    raised: Exception, kind: type[Exception], text: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(planner_module, "find_targets", fail)
    found = asked(model, AdapterOptions())
    assert type(found) is kind
    assert text in str(found)


@pytest.mark.usefixtures("copied")
def test_a_package_that_is_missing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(planner_module, "quiet_transformers", missing)
    words = r"No module named 'transformers'. The command line needs its extra: pip install 'pissa-kernels\["
    refused(capsys, words, model, tmp_path / "out")


@pytest.mark.usefixtures("copied")
def test_it_is_killed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_module, "find_targets", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    words = "error: the process that asks transformers and PEFT has died with exit code -9$"
    refused(capsys, words, model, tmp_path / "out", "--workers", 2)


def test_a_process_with_threads_is_not_copied(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(commands, "Planner", copied)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert not planner_module.may_fork()
        assert init(model, tmp_path / "out") == 0
    finally:
        done.set()
        thread.join()


def test_an_answer_is_enough(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that other packages have left running does not hold up who has the answer."""
    found = find_targets(open_checkpoint(model), AdapterOptions())

    def leave_a_thread(*_: object) -> Adapter:
        threading.Thread(target=time.sleep, args=(60,)).start()
        return found

    monkeypatch.setattr(planner_module, "find_targets", leave_a_thread)
    monkeypatch.setattr(planner_module, "SECONDS_TO_END", 0.1)
    began = time.perf_counter()
    assert asked(model, AdapterOptions()) == found
    assert time.perf_counter() - began < 30


def test_an_interrupt_ends_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "find_targets", lambda *_: signal.pause())
    with pytest.raises(KeyboardInterrupt), Planner(open_checkpoint(model), AdapterOptions()):
        raise KeyboardInterrupt
    assert multiprocessing.active_children() == []


ORPHANED = """
import os, signal, sys, time
from pathlib import Path
from pissa_kernels.checkpoint import planner
from pissa_kernels.checkpoint.folder import open_checkpoint
from pissa_kernels.checkpoint.targets import AdapterOptions
planner.quiet_transformers = lambda: None
planner.find_targets = lambda *_: time.sleep(0.5) or (_ for _ in ()).throw(ValueError("a refusal"))
with planner.Planner(open_checkpoint(Path(sys.argv[1])), AdapterOptions()):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Wait until nobody holds its output any more."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_an_orphan_ends_quietly(model: Path) -> None:
    done = run(ORPHANED, model)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout + done.stderr == ""


COMMAND = """
import sys
from pissa_kernels import cli
code = cli.main(["init", *sys.argv[1:], "--rank", "4"])
print([name for name in ("transformers", "peft") if name in sys.modules])
sys.exit(code)
"""


def test_the_command_imports_neither(model: Path, tmp_path: Path) -> None:
    done = run(COMMAND, model, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
