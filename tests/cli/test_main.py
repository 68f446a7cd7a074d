"""The ``pissa-kernels`` command itself: version, help, and what becomes of errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pissa_kernels as pk
from pissa_kernels.cli import init as init_command
from pissa_kernels.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "init", "verify", "convert", "report")


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Output of a command that argparse ends with exit status 0."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["--version"], capsys) == f"pissa-kernels {pk.__version__}\n"


@pytest.mark.slow
def test_module_and_command_are_the_same() -> None:
    command = Path(sys.executable).with_name("pissa-kernels")
    runs = [[sys.executable, "-m", "pissa_kernels"], *([[str(command)]] if command.exists() else [])]
    for run in runs:
        done = subprocess.run([*run, "--version"], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"pissa-kernels {pk.__version__}\n", "")


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["--help"], capsys)
    assert [name for name in COMMANDS if re.search(rf"^    {name} +\w", text, re.MULTILINE)] == list(COMMANDS)
    assert "Exit status: 0 for success, 1 if the work failed or a check does not hold, 2 for" in " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option is explained, and no line is wider than a terminal of 80 columns."""
    monkeypatch.setitem(os.environ, "COLUMNS", "80")
    text = printed([command, "--help"], capsys)
    usage, _, body = text.partition("\n\n")
    assert usage.startswith(f"usage: pissa-kernels {command} ")
    assert max(map(len, text.splitlines())) <= 80
    options = set(re.findall(r"\[(--[\w-]+)", usage))
    assert "--json" in options
    for option in options:
        assert re.search(rf"^  {option}\b[^\n]*(  +\w|\n {{10,}}\w)", body, re.MULTILINE), option


def test_help_of_init_has_the_options_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["init", "--help"], capsys)
    positions = [
        text.index(words)
        for words in (
            "MODEL  ",
            "adapter, as for PEFT's LoraConfig:",
            "  --rank R  ",
            "run:",
            "--resume  ",
            "examples:",
        )
    ]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FileNotFoundError("a is missing"), 2, "a is missing"),
        (FileExistsError("a exists"), 2, "a exists"),
        (NotADirectoryError("a is not a folder"), 2, "a is not a folder"),
        (OSError("the disk failed"), 1, "the disk failed"),
        (ValueError("two\n  lines"), 1, "two lines"),
        (TypeError("a type"), 1, "a type"),
        (RuntimeError("a run"), 1, "a run"),
        (ModuleNotFoundError("No module named 'peft'"), 1, "No module named 'peft'. The command line needs its extra: "
         "pip install 'pissa-kernels[demo]'"),
        (ImportError("matplotlib is missing: pip install 'pissa-kernels[report]'"), 1,
         "matplotlib is missing: pip install 'pissa-kernels[report]'"),
        (KeyboardInterrupt(), 1, "interrupted; finished tensors are kept, and --resume continues the run"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_errors_are_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(init_command, "init_checkpoint", fail)
    assert main(["init", "MODEL", "OUT"]) == code
    assert capsys.readouterr() == ("", f"pissa-kernels: error: {line}\n")


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug gets its traceback."""

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(init_command, "init_checkpoint", fail)
    with pytest.raises(ZeroDivisionError):
        main(["init", "MODEL", "OUT"])
