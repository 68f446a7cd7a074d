"""Entry point of the command: runs a subcommand, and turns exceptions into one line on stderr and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from .._version import __version__
from ..runtime.workers import left_behind
from . import convert, demo, init, merge, report, verify
from .arguments import EXIT_FAILED, EXIT_USAGE
from .streams import accept_all_text, one_line, reserved_stdout

_EXTRA = ". The command line needs its extra: pip install 'pissa-kernels[cli]'"


def command(argv: Sequence[str] | None = None) -> int:
    """Run :func:`main` in a process that does nothing else."""
    # modules live until the process ends; without torch's, the last garbage collections take half a second less
    gc.freeze()
    code = main(argv)
    if left_behind():  # threads whose results nobody takes; Python would wait for them
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments, without the program's name; None for those of the process.

    Returns:
        Exit status: 0 for success, 1 if the work failed or a check does not hold, 2 for bad arguments.
    """
    accept_all_text()
    arguments = _parser().parse_args(argv)
    try:
        with reserved_stdout():
            return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return _fail(f"interrupted; {getattr(arguments, 'interrupted', 'nothing was saved')}", EXIT_FAILED)
    except Exception as error:
        if arguments.traceback:
            traceback.print_exc()
        if isinstance(error, BrokenPipeError):
            kept = getattr(arguments, "interrupted", "")
            return _fail(f"nothing reads the output any more{kept and f'; {kept}'}", EXIT_FAILED)
        return _fail(*_described(error))


def _described(error: Exception) -> tuple[str, int]:
    """The message of an error, and the exit status.

    Other packages raise errors of all kinds on files that are damaged, and their messages may have many lines.
    """
    text = str(error)
    if isinstance(error, ImportError):
        missing = isinstance(error, ModuleNotFoundError) and "pip install" not in text  # it may name its extra
        return text + _EXTRA * missing, EXIT_FAILED
    if isinstance(error, FileNotFoundError) and error.errno is not None and error.filename is None:
        return "the current directory does not exist any more; change to another one", EXIT_USAGE
    if isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError)):
        return text, EXIT_USAGE
    if isinstance(error, MemoryError):
        return f"out of memory{text and f': {text}'}", EXIT_FAILED
    if isinstance(error, (OSError, RuntimeError, TypeError, ValueError)) and text:
        return text, EXIT_FAILED
    return f"{type(error).__name__}{text and f': {text}'}; --traceback shows where", EXIT_FAILED


def _fail(text: str, code: int) -> int:
    with contextlib.suppress(OSError):  # a full disk, for example: the status still tells
        print(f"pissa-kernels: error: {one_line(text)}", file=sys.stderr, flush=True)
    return code


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line, as all other errors; --help shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pissa-kernels",
        description="PiSSA adapters for PEFT: exact principal components at the price of a rough sketch.",
        epilog="pissa-kernels COMMAND --help describes a command. Exit status: 0 for success, 1 if the work failed or "
        "a check does not hold, 2 for bad arguments.",
    )
    parser.add_argument(
        "--version", action="version", version=f"pissa-kernels {__version__}", help="show the version and exit"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (demo, init, verify, convert, merge, report):
        module.add_parser(commands)
    for command in commands.choices.values():
        command.add_argument(
            "--traceback", action="store_true", help="on an error, print where it was raised before its message"
        )
    return parser
