"""``pissa-kernels verify``: check an initialized checkpoint against the original."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.check_quantized import QuantizedCheck
from ..checkpoint.findings import Verification
from ..checkpoint.verify import verify_checkpoint
from ..report.tables import text_table
from .arguments import EXIT_FAILED, positive, quiet_bitsandbytes
from .streams import output

DESCRIPTION = """\
Check a result of pissa-kernels init against the original checkpoint. Both are
read completely, one tensor at a time:

  - every byte of OUT has the hash that was recorded when it was written;
  - tensors and files that were copied equal those in BASE bit for bit;
  - W_res + s·B·A is W to one rounding, of each expert of a stack;
  - A and B are the singular triplets of their certificate;
  - codes and scales of a quantized result are those of quantizing W - s·B·A
    again, and the errors are those of the report.

The exit status is 1 if anything does not hold."""


def add_parser(commands: Any) -> None:
    """Declare ``verify BASE OUT``."""
    parser = commands.add_parser(
        "verify",
        help="check every tensor of an initialized checkpoint against the original",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of the original checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that pissa-kernels init has written")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="number of tensors at a time (default: torch's number of threads)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify the checkpoint and print the findings."""
    quiet_bitsandbytes()
    findings = verify_checkpoint(arguments.base, arguments.out, workers=arguments.workers, progress=not arguments.json)
    if arguments.json:
        output(json.dumps(_as_json(findings)))
    else:
        output(_as_text(findings))
        if findings:
            where = ", ".join(dict.fromkeys(finding.where for finding in findings))
            print(f"pissa-kernels: error: {arguments.out} does not hold: {where}", file=sys.stderr)
    return EXIT_FAILED if findings else 0


def _as_json(findings: Verification) -> dict[str, Any]:
    return {
        "holds": not findings,
        "layers": [_finite(asdict(layer)) for layer in findings.layers],
        "quantized": [_finite(asdict(layer)) for layer in findings.quantized],
        "copied": findings.copied,
        "files": findings.files,
        "problems": [list(finding) for finding in findings],
        "extra": findings.extra,
    }


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with null for NaN and Inf, which are no JSON."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    if (parts := finite.pop("parts", None)) is not None and parts:  # the matrices of a stack
        finite["parts"] = [_finite(part) for part in parts]
    return finite


def _as_text(findings: Verification) -> str:
    rows = [
        [
            layer.name,
            f"{layer.reconstruction:.2f}",
            f"{100 * layer.energy:.2f}",
            f"{layer.residual:.0e}",
            "FAILED" if layer.problem else "holds",
        ]
        for layer in findings.layers
    ]
    heads = ["layer", "W_res + s·B·A, × rounding", "energy, %", "residual/σ₁", "check"]
    lines = [text_table(heads, rows, [0, 4]), ""] if rows or not findings.quantized else []
    if findings.quantized:
        lines += [_quantized_table(findings.quantized), ""]
    lines += [f"FAILED: {where}: {what}" for where, what in findings]
    if findings.extra:
        lines.append(f"not part of the result: {', '.join(findings.extra)}")
    failed = f"{len(findings)} problem{'s' * (len(findings) > 1)}"
    holds = ["every byte is as written"]
    holds += ["W_res + s·B·A is W to one rounding"] if findings.layers or not findings.quantized else []
    holds += ["codes are those of W − s·B·A"] if findings.quantized else []
    verdict = failed if findings else ", and ".join(holds)
    quantized = f"{len(findings.quantized)} quantized weights, " if findings.quantized else ""
    counts = f"{len(findings.layers)} residuals, {quantized}{findings.copied} tensors copied bit for bit"
    lines.append(f"{counts}, {findings.files} other files: {verdict}")
    return "\n".join(lines)


def _quantized_table(layers: list[QuantizedCheck]) -> str:
    """A row for each quantized weight: its error, what PiSSA saves of it, and bytes unlike this machine's."""
    rows = [
        [
            layer.name,
            f"{layer.error:.4g}",
            f"{layer.error_without:.4g}" if layer.adapted else "",
            f"{100 * (1 - layer.error / layer.error_without):.1f}" if layer.adapted and layer.error_without else "",
            str(layer.apart),
            "FAILED" if layer.problem else "holds",
        ]
        for layer in layers
    ]
    return text_table(["layer", "error", "without PiSSA", "saved, %", "other bytes", "check"], rows, [0, 5])
