"""``pissa-kernels merge``: merge a trained adapter into the checkpoint that it was trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..merge.run import DTYPES, merge_checkpoint
from .arguments import positive, quiet_libraries
from .streams import output

DESCRIPTION = """\
Merge a trained adapter into the checkpoint that it was trained on: W + s·B·A
for every adapted weight, summed in float32 and rounded once. OUT is a result of
pissa-kernels init, or any checkpoint with a LoRA trained on it. Weights in NF4,
FP4 or int8 (bitsandbytes) are dequantized, so that MERGED is a full 16-bit
checkpoint. The model is not loaded: each worker holds one weight at a time.
MERGED appears once it is complete."""


def add_parser(commands: Any) -> None:
    """Declare ``merge OUT TRAINED MERGED``."""
    parser = commands.add_parser(
        "merge",
        help="merge a trained adapter into its checkpoint, quantized or not, without loading the model",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the checkpoint that was trained on")
    parser.add_argument("trained", type=Path, metavar="TRAINED", help="folder of the trained adapter")
    parser.add_argument("merged", type=Path, metavar="MERGED", help="folder of the result")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="dtype of all weights (default: that of OUT, or of its dequantized ones)"
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="number of tensors at a time (default: torch's number of threads)"
    )
    parser.add_argument("--force", action="store_true", help="replace a MERGED that merge has made")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code of OUT to build its model")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Merge the adapter and print the report."""
    quiet_libraries()
    report = merge_checkpoint(
        arguments.out,
        arguments.trained,
        arguments.merged,
        dtype=arguments.dtype,
        workers=arguments.workers,
        force=arguments.force,
        trust_remote_code=arguments.trust_remote_code,
        progress=not arguments.json,
    )
    output(report.to_json() if arguments.json else report.table())
    return 0
