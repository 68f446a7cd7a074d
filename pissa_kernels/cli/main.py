"""Entry point of the command: runs a subcommand, and turns exceptions into one line on stderr and an exit status."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence

from .._version import __version__
from . import convert, demo, init, report, verify
from .arguments import EXIT_FAILED, EXIT_USAGE


def command(argv: Sequence[str] | None = None) -> int:
    """Run :func:`main` in a process that does nothing else."""
    # modules live until the process ends; without torch's, the last garbage collections take half a second less
    gc.freeze()
    return main(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments, without the program's name; None for those of the process.

    Returns:
        Exit status: 0 for success, 1 if the work failed or a check does not hold, 2 for bad arguments.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ImportError as error:
        if "pip install" in str(error):  # the message names its extra
            return _fail(error, EXIT_FAILED)
        return _fail(f"{error}. The command line needs its extra: pip install 'pissa-kernels[demo]'", EXIT_FAILED)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        return _fail(error, EXIT_USAGE)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {getattr(arguments, 'interrupted', 'nothing was saved')}", EXIT_FAILED)


def _fail(error: object, code: int) -> int:
    print("pissa-kernels: error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pissa-kernels",
        description="PiSSA adapters for PEFT: exact principal components at the price of a rough sketch.",
        epilog="pissa-kernels COMMAND --help describes a command. Exit status: 0 for success, 1 if the work failed or "
        "a check does not hold, 2 for bad arguments.",
    )
    parser.add_argument(
        "--version", action="version", version=f"pissa-kernels {__version__}", help="show the version and exit"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (demo, init, verify, convert, report):
        module.add_parser(commands)
    return parser
