"""The ``pissa-kernels`` command itself: version, help, and what becomes of errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.cli import init as init_command
from pissa_kernels.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "init", "verify", "convert", "merge", "report")


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Output of a command that argparse ends with exit status 0."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def raising(error: BaseException) -> Any:
    """A function that raises an error."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


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
         "pip install 'pissa-kernels[cli]'"),
        (ImportError("a kernel is missing"), 1, "a kernel is missing"),
        (BrokenPipeError(32, "Broken pipe"), 1, "nothing reads the output any more; finished tensors are kept, and "
         "--resume continues the run"),
        (ImportError("matplotlib is missing: pip install 'pissa-kernels[report]'"), 1,
         "matplotlib is missing: pip install 'pissa-kernels[report]'"),
        (KeyboardInterrupt(), 1, "interrupted; finished tensors are kept, and --resume continues the run"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_errors_are_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init_command, "init_checkpoint", raising(error))
    assert main(["init", "MODEL", "OUT"]) == code
    assert capsys.readouterr() == ("", f"pissa-kernels: error: {line}\n")


class ValidationError(Exception):
    """An error of another package."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("weight"), "KeyError: 'weight'; --traceback shows where"),
        (ZeroDivisionError(), "ZeroDivisionError; --traceback shows where"),
        (
            ValidationError("field 'a'\n  expected bool"),
            "ValidationError: field 'a' expected bool; --traceback shows where",
        ),
        (MemoryError(), "out of memory"),
        (MemoryError("layer 'a': 12 bytes"), "out of memory: layer 'a': 12 bytes"),
        (ValueError(), "ValueError; --traceback shows where"),
        (ValueError("a\x1b[31m\udcff"), r"a\x1b[31m\udcff"),
        (ValueError("a" * 10_000), "a" * 599 + "…"),
        (re.error("missing )"), "error: missing ); --traceback shows where"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_of_any_kind_are_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(init_command, "init_checkpoint", fail)
    assert main(["init", "MODEL", "OUT"]) == 1
    assert capsys.readouterr() == ("", f"pissa-kernels: error: {line}\n")
    assert main(["init", "MODEL", "OUT", "--traceback"]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("Traceback (most recent call last):\n")
    assert errors.endswith(f"pissa-kernels: error: {line}\n")


def run_report(report: Path, stdout: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "pissa_kernels", "report", str(report)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report whose table has signs that few encodings have, and a name with others."""
    certificate = pk.Certificate(passes=5, energy=0.5, residual=2e-6, converged=True, method="krylov")
    sigma = torch.tensor([4.0, 2.0])
    layer = pk.LayerReport("é.Ж", (64, 48), 2, certificate, 0.25, sigma, torch.bfloat16, 1.0, "pissa", seed=0)
    path = tmp_path / "report.json"
    pk.Report([layer]).write(path)
    return path


def test_other_packages_do_not_print_into_the_result(
    report: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed, whose log goes to standard output."""
    read = pk.Report.read

    def with_a_log(path: Path) -> pk.Report:
        print("[WARNING] a log")
        return read(path)

    monkeypatch.setattr(pk.Report, "read", with_a_log)
    assert main(["report", str(report), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(report.read_text())
    assert captured.err == "[WARNING] a log\n"
    print("as before")
    assert capsys.readouterr().out == "as before\n"


def test_without_a_standard_output_the_result_goes_nowhere(
    report: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["report", str(report), "--json"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "name", "head"),
    [
        ("utf-8", "é.Ж", "σ₁"),
        ("latin-1", r"é.\u0416", "sigma1"),
        ("cp1251", r"\xe9.Ж", "sigma1"),
        ("ascii", r"\xe9.\u0416", "sigma1"),
    ],
)
def test_a_terminal_of_any_encoding(encoding: str, name: str, head: str, report: Path) -> None:
    done = run_report(report, subprocess.PIPE, PYTHONIOENCODING=encoding)
    text = done.stdout.decode(encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert f" {head} " in text.splitlines()[0]
    assert text.splitlines()[2].startswith(f"{name} ")


def test_a_current_directory_that_was_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    try:
        Path().absolute()
    except OSError as error:
        monkeypatch.setattr(init_command, "init_checkpoint", raising(error))
    assert main(["init", "MODEL", "OUT"]) == 2
    assert capsys.readouterr().err == (
        "pissa-kernels: error: the current directory does not exist any more; change to another one\n"
    )


@pytest.mark.slow
def test_an_output_that_cannot_be_written(report: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "wb") as closed:
        done = run_report(report, closed)
    assert (done.returncode, done.stderr) == (1, b"pissa-kernels: error: nothing reads the output any more\n")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            done = run_report(report, full)
        message = b"pissa-kernels: error: [Errno 28] No space left on device: 'standard output'\n"
        assert (done.returncode, done.stderr) == (1, message)
