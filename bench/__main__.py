"""``python -m bench COMMAND …``: run one benchmark or tool."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

from .commands import BENCHMARKS, COMMANDS, TOOLS, Command


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        usage="%(prog)s COMMAND ...",
        description=f"{_listed('benchmarks', BENCHMARKS)}\n\n{_listed('tools', TOOLS)}",
        epilog="python -m bench COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    # everything after the name is parsed by the command, whose module may take seconds to import
    name: str = parser.parse_args(given[:1]).command
    module = importlib.import_module(f"{__package__}.{COMMANDS[name].module}")
    status: int = module.main(name, given[1:])
    return status


def _listed(title: str, commands: Mapping[str, Command]) -> str:
    width = max(map(len, COMMANDS))
    return f"{title}:\n" + "\n".join(f"  {name:{width}}  {command.summary}" for name, command in commands.items())


if __name__ == "__main__":
    sys.exit(main())
