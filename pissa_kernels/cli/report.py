"""``pissa-kernels report``: print and draw the report of an initialization, and suggest ranks."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from ..report import Report, find_report
from ..report.spectrum import suggestion
from .arguments import share
from .streams import output


def add_parser(commands: Any) -> None:
    """Declare ``report SOURCE``."""
    parser = commands.add_parser(
        "report",
        help="print and draw the report of an initialization, and suggest ranks",
        description="Print the report of an initialization: a row for each layer, a total, and the rank that keeps a "
        "share of the captured energy. --pictures also draws it, --html writes it as a web page.",
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE",
        help="report (JSON), or a folder that holds pissa_report.json or pissa_init/pissa_report.json",
    )  # fmt: skip
    parser.add_argument(
        "--share", type=share, action="append", metavar="Q",
        help="share of the captured energy that a lower rank should keep, 0 < Q ≤ 1; can be repeated (default: 0.9)",
    )  # fmt: skip
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw energy, spectra and ranks into this folder")
    parser.add_argument("--svg", action="store_true", help="draw the pictures as SVG instead of PNG")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report with its pictures as one HTML page")
    parser.add_argument("--parts", action="store_true", help="show a row for each expert of a stack, too")
    parser.add_argument("--json", action="store_true", help="print only the JSON of the report")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report, and write the pictures and the page if requested."""
    # of matplotlib: names may have signs that its font lacks
    warnings.filterwarnings("ignore", category=UserWarning, message="Glyph")
    report = Report.read(find_report(arguments.source))
    shares = sorted(set(arguments.share or [0.9]))
    if arguments.html is not None:
        from ..report.page import check_page

        check_page(arguments.html)  # before the pictures are drawn
    drawn = []
    if arguments.pictures is not None:
        from ..report.pictures import draw

        drawn = draw(report, arguments.pictures, shares, "svg" if arguments.svg else "png")
    if arguments.html is not None:
        from ..report.page import write_page

        write_page(report, arguments.html, shares, f"PiSSA initialization of {arguments.source.resolve().name}")
    if arguments.json:
        output(report.to_json())
        return 0
    output(report.table(parts=arguments.parts))
    for q in shares if report.layers else []:
        output(suggestion(report.layers, q))
    for path in drawn:
        output(f"drew {path}")
    if arguments.html is not None:
        output(f"wrote {arguments.html}")
    return 0
