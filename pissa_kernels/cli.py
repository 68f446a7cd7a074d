"""The command line: arguments in, tables and exit codes out; the work is elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import initializer, positive
from .checkpoint.commands import add_init, add_verify
from .convert.command import add_convert
from .report import Report, find_report
from .report.spectrum import check_share, suggestion
from .report.tables import text_table

if TYPE_CHECKING:
    from .examples.demo import DemoResult

EXIT_FAILED, EXIT_USAGE = 1, 2


def command(argv: Sequence[str] | None = None) -> int:
    """:func:`main` for a process that does nothing else."""
    # torch's modules stay to the end, and nothing is to be found among them: it would take the collections on the way
    # out half a second. What is imported later may want to be collected (nanobind complains where it was not).
    gc.freeze()
    return main(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 the work failed or a check does not hold, 2 bad arguments."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ImportError as error:
        if "pip install" in str(error):  # it names its extra itself
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
        prog="pissa-kernels", description="PiSSA adapters: the exact principal components for the price of a sketch."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="initialise a model's adapter through PEFT, check it, and compare with PEFT's own",
        description="Load a model, inject a PiSSA adapter through PEFT, print what each layer captured, check that the "
        "model's output has not changed, and time PEFT's own initializers on the same model.",
    )
    demo.add_argument(
        "model_dir", nargs="?", type=Path, metavar="MODEL_DIR",
        help="a folder that transformers loads; without it, all-MiniLM-L6-v2, a BERT that the demo extra carries",
    )  # fmt: skip
    demo.add_argument("--rank", type=positive, default=16, help="r of every layer (default 16)")
    demo.add_argument("--init", type=initializer, default="pissa", help="pissa (default) or pissa_niter_N")
    demo.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME",
        help="module names as PEFT takes them, or all-linear (default)",
    )  # fmt: skip
    demo.add_argument(
        "--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
        help="dtype to load the model in; auto is the one that it was saved in (default)",
    )  # fmt: skip
    demo.add_argument("--no-compare", action="store_true", help="do not run PEFT's own initializers")
    demo.add_argument("--out", type=Path, metavar="DIR", help="save the residual model, and its adapter in pissa_init/")
    demo.add_argument("--json", action="store_true", help="print one JSON object and no table")
    demo.set_defaults(run=_demo)
    add_init(commands)
    add_verify(commands)
    add_convert(commands)
    report = commands.add_parser(
        "report",
        help="print and draw what an initialisation did, and the ranks that its spectra suggest",
        description="Print the report of an initialisation: a row for each layer, all together, and the rank that "
        "keeps a share of the captured energy. With --pictures also draw it, with --html write a page.",
    )
    report.add_argument(
        "source", type=Path, metavar="SOURCE",
        help="a report (JSON), or a folder that holds pissa_report.json or pissa_init/pissa_report.json",
    )  # fmt: skip
    report.add_argument(
        "--share", type=_share, action="append", metavar="Q",
        help="share of the captured energy that a lower rank should keep, 0 < Q ≤ 1 (default 0.9); can be repeated",
    )  # fmt: skip
    report.add_argument("--pictures", type=Path, metavar="DIR", help="draw energy, spectra and ranks into this folder")
    report.add_argument("--svg", action="store_true", help="draw SVG, not PNG")
    report.add_argument("--html", type=Path, metavar="FILE", help="write all of it as one HTML page")
    report.add_argument("--json", action="store_true", help="print the report's JSON and nothing else")
    report.set_defaults(run=_report)
    return parser


def _share(text: str) -> float:
    try:
        check_share(value := float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def _demo(arguments: argparse.Namespace) -> int:
    import transformers

    from .examples.demo import demo_model, run_demo

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # other packages' advice to developers is no part of this command's output
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    targets = arguments.target_modules
    result = run_demo(
        arguments.model_dir or demo_model(),
        rank=arguments.rank,
        init=arguments.init,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        dtype=arguments.dtype,
        out=arguments.out,
        compare=not arguments.no_compare,
    )
    print(json.dumps(_as_json(result)) if arguments.json else _as_text(result))
    return 0 if result.holds else EXIT_FAILED


def _report(arguments: argparse.Namespace) -> int:
    report = Report.read(find_report(arguments.source))
    shares = sorted(set(arguments.share or [0.9]))
    drawn = []
    if arguments.pictures is not None:
        from .report.pictures import draw

        drawn = draw(report, arguments.pictures, shares, "svg" if arguments.svg else "png")
    if arguments.html is not None:
        from .report.page import write_page

        write_page(report, arguments.html, shares, f"PiSSA initialisation of {arguments.source.resolve().name}")
    if arguments.json:
        print(report.to_json())
        return 0
    print(report.table())
    for share in shares if report.layers else []:
        print(suggestion(report.layers, share))
    for path in drawn:
        print(f"drew {path}")
    if arguments.html is not None:
        print(f"wrote {arguments.html}")
    return 0


def _as_json(result: DemoResult) -> dict[str, Any]:
    record = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    record["runs"] = [dataclasses.asdict(run) for run in result.runs]
    record["layers"] = [
        {
            "name": layer.name,
            "shape": list(layer.shape),
            "rank": layer.rank,
            "seconds": layer.seconds,
            "singular_values": layer.singular_values.tolist(),
            **dataclasses.asdict(layer.certificate),
        }
        for layer in result.layers
    ]
    return {**record, "holds": result.holds}


def _as_text(result: DemoResult) -> str:
    text = [Report(layers=result.layers).table()]
    trained = sum(layer.rank * sum(layer.shape) for layer in result.layers)
    text.append(
        f"{result.model}: {len(result.layers)} layers, rank {result.rank}, {result.init}, {result.dtype}; "
        f"{trained:,} of {result.parameters:,} parameters in the adapter"
    )
    text.append(result.machine)
    text.append("")
    ours = result.runs[0]
    runs = [
        [
            run.name,
            f"{run.seconds:.3f}",
            f"{run.seconds / ours.seconds:.2f}",
            "" if run.energy_lost is None else f"{run.energy_lost:.1e}",
        ]
        for run in result.runs
    ]
    text.append(text_table(["get_peft_model with", "s", "× ours", "energy lost (worst layer)"], runs))
    text.append("")
    verdict = "unchanged" if result.holds else "CHANGED"
    text.append(
        f"output {verdict}: moved by {result.output_moved:.1e} (relative; {result.dtype} rounding allows "
        f"{result.output_allowed:.1e}); W_res + s·B·A is W within {result.reconstruction:.2f} of the rounding bound"
    )
    if result.saved_to is not None:
        text.append(
            f"saved to {result.saved_to} (residual model) and {result.saved_to}/pissa_init (adapter); "
            f"loaded back with plain transformers and PEFT, the output moved by {result.saved_moved:.1e}"
        )
    return "\n".join(text)
