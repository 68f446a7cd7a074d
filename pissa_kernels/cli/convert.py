"""``pissa-kernels convert``: turn a trained PiSSA adapter into a plain LoRA of the original model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..convert.convert import convert_adapter
from .arguments import positive
from .streams import output


def add_parser(commands: Any) -> None:
    """Declare ``convert TRAINED INIT OUT``."""
    parser = commands.add_parser(
        "convert",
        help="turn a trained PiSSA adapter into a plain LoRA of the original model",
        description="Turn a trained PiSSA adapter and its initial adapter into a plain LoRA of the ORIGINAL model, "
        "without loading a model: exact, of rank 2r, or with --rank K the nearest of that rank. Trained heads, "
        "embeddings and DoRA's magnitudes are copied. If the residual is quantized, the report says what is lost; "
        "merge keeps it.",
    )
    parser.add_argument("trained", type=Path, metavar="TRAINED", help="folder of the trained adapter")
    parser.add_argument(
        "initial", type=Path, metavar="INIT",
        help="folder of the initial adapter, or one that holds pissa_init/ or pissa_initial.safetensors",
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the plain LoRA")
    parser.add_argument("--rank", type=positive, metavar="K", help="truncate to this rank, up to 2r (default: 2r)")
    parser.add_argument(
        "--base", metavar="BASE",
        help="the original model, for the config; a folder is compared with the residual checkpoint around INIT",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an adapter in OUT that convert has made")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert the adapter and print the report."""
    report = convert_adapter(
        arguments.trained,
        arguments.initial,
        arguments.out,
        rank=arguments.rank,
        base=arguments.base,
        force=arguments.force,
    )
    if report.dropped is not None:
        print(f"pissa-kernels: {report.dropped.describe()}", file=sys.stderr)
    output(report.to_json() if arguments.json else report.table())
    return 0
