"""The command line of ``convert``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..convert.convert import Conversion, convert_adapter
from ..report.tables import text_table
from .arguments import positive


def add_parser(commands: Any) -> None:
    """Declare ``convert TRAINED INIT OUT``."""
    parser = commands.add_parser(
        "convert",
        help="turn a trained PiSSA adapter into a plain LoRA for the original model",
        description="Turn a trained PiSSA adapter and its initial one into a plain LoRA for the ORIGINAL base model, "
        "without loading a model: rank 2r and exact, or with --rank K the nearest of that rank. Trained heads, "
        "embeddings and DoRA's magnitudes come along.",
    )
    parser.add_argument("trained", type=Path, metavar="TRAINED", help="the trained adapter's folder")
    parser.add_argument(
        "initial", type=Path, metavar="INIT",
        help="the untrained adapter's folder, or one that holds pissa_init/ or pissa_initial.safetensors",
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="the plain LoRA's folder to be")
    parser.add_argument("--rank", type=positive, metavar="K", help="recompress to this rank, at most 2r (default 2r)")
    parser.add_argument(
        "--base", metavar="BASE",
        help="the original model, to be named in the config; a folder is compared with the residual model around INIT",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an adapter that is at OUT")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    conversion = convert_adapter(
        arguments.trained,
        arguments.initial,
        arguments.out,
        rank=arguments.rank,
        base=arguments.base,
        force=arguments.force,
    )
    print(json.dumps(conversion.to_dict()) if arguments.json else _text(conversion))
    return 0


def _text(conversion: Conversion) -> str:
    rows = [[layer.name, str(layer.rank), f"{layer.loss:.2e}"] for layer in conversion.layers]
    ranks = sorted({layer.rank for layer in conversion.layers})
    lines = [
        text_table(["layer", "rank", "loss"], rows),
        "",
        f"{conversion.out}: a plain LoRA of {conversion.base or 'a model that is not named'}, "
        f"{len(rows)} layers, rank {' to '.join(map(str, sorted({ranks[0], ranks[-1]})))}, "
        f"loss {conversion.loss:.2e} of all together",
    ]
    if conversion.carried:
        lines.append(f"{len(conversion.carried)} other tensors came along")
    if conversion.checked is not None:
        lines.append(f"the same as the residual model with the trained adapter, within {conversion.checked:.2f} of the "
                     "rounding bound")  # fmt: skip
    return "\n".join([*lines, *(f"note: {note}" for note in conversion.notes)])
