"""``pissa-kernels verify``: check an initialized checkpoint against the original."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.verify import verify_checkpoint
from ..report.tables import text_table
from .arguments import positive


def add_parser(commands: Any) -> None:
    """Declare ``verify BASE OUT``."""
    parser = commands.add_parser(
        "verify",
        help="check every tensor of an initialised checkpoint against the original",
        description="Read both checkpoints, a tensor at a time: untouched tensors are bit-identical, W_res + s·B·A is "
        "W to one rounding, A and B are the triplets of their certificate, and every byte of OUT is the one that was "
        "written. Exit status 1 if anything is off.",
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="the original checkpoint's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="what pissa-kernels init made of it")
    parser.add_argument("--workers", type=positive, metavar="N", help="tensors at a time (default: cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    found = verify_checkpoint(arguments.base, arguments.out, workers=arguments.workers, shown=not arguments.json)
    if arguments.json:
        print(json.dumps({"holds": found.holds, **asdict(found)}))
        return 0 if found.holds else 1
    rows = [
        [
            layer.name,
            f"{layer.reconstruction:.2f}",
            f"{100 * layer.energy:.2f}",
            f"{layer.residual:.0e}",
            "OFF" if layer.problem else "holds",
        ]
        for layer in found.layers
    ]
    print(text_table(["layer", "W_res + s·B·A, × rounding", "energy, %", "residual/σ₁", ""], rows, [0, 4]))
    print()
    for where, what in found.problems:
        print(f"OFF: {where}: {what}")
    if found.extra:
        print(f"not of this result: {', '.join(found.extra)}")
    print(
        f"{len(found.layers)} residuals, {found.copied} tensors copied bit for bit, {found.files} other files: "
        + ("all as written, and W to one rounding" if found.holds else f"{len(found.problems)} things are OFF")
    )
    if not found.holds:
        where = ", ".join(dict.fromkeys(where for where, _ in found.problems))
        print(f"pissa-kernels: error: {arguments.out} does not hold: {where}", file=sys.stderr)
    return 0 if found.holds else 1
