"""The command line of the benchmarks: every command is listed and explains its options."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.__main__ import main
from bench.commands import COMMANDS


def test_help_lists_every_command_and_imports_none() -> None:
    code = "import sys; from bench.__main__ import main; sys.modules['torch'] = None; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert command.summary in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m bench {name} [-h]")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["table"], ["gpu", "--no-such-option"]])
def test_bad_commands_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m bench")
