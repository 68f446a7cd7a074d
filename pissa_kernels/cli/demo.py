"""``pissa-kernels demo``: initialize one model through PEFT, check it, and compare with PEFT's own initializers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter.names import ADAPTER_FOLDER
from ..report import Report
from ..report.tables import text_table
from .arguments import EXIT_FAILED, initializer, positive, quiet_libraries
from .streams import output

if TYPE_CHECKING:
    from ..examples.demo import DemoResult


def add_parser(commands: Any) -> None:
    """Declare ``demo [MODEL_DIR]``."""
    parser = commands.add_parser(
        "demo",
        help="initialize a model's adapter through PEFT, check it, and compare with PEFT's own",
        description="Load a model, initialize a PiSSA adapter through PEFT, print the energy that each layer captures, "
        "check that the model's output has not changed, and time PEFT's own initializers on the same model.",
    )
    parser.add_argument(
        "model_dir", nargs="?", type=Path, metavar="MODEL_DIR",
        help="folder that transformers loads (default: all-MiniLM-L6-v2, a BERT that the demo extra installs)",
    )  # fmt: skip
    parser.add_argument("--rank", type=positive, default=16, help="rank r of every layer (default: 16)")
    parser.add_argument("--init", type=initializer, default="pissa", help="pissa or pissa_niter_N (default: pissa)")
    parser.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME",
        help="names of modules, one regular expression, or all-linear: the linear layers that PiSSA can initialize "
        "(default: all-linear)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
        help="dtype to load the model in; auto keeps the dtype of the file (default: auto)",
    )  # fmt: skip
    parser.add_argument("--no-compare", action="store_true", help="do not run PEFT's own initializers")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="save the residual model, with its adapter in pissa_init/"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print the result."""
    quiet_libraries()
    from ..examples.demo import demo_model, run_demo

    result = run_demo(
        arguments.model_dir or demo_model(),
        rank=arguments.rank,
        init=arguments.init,
        target_modules=arguments.target_modules,
        dtype=arguments.dtype,
        out=arguments.out,
        compare=not arguments.no_compare,
    )
    output(json.dumps(_as_json(result)) if arguments.json else _as_text(result))
    return 0 if result.holds else EXIT_FAILED


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


def _as_lines(heading: str, layers: dict[str, str]) -> list[str]:
    """A line for each reason, with the layers that it holds for; layers of different blocks count as one."""
    names: dict[str, dict[str, None]] = {}
    for name, reason in layers.items():
        names.setdefault(_any_block(reason), {})[_any_block(name)] = None
    return [f"{heading}: {', '.join(found)}" + (f": {reason}" if reason else "") for reason, found in names.items()]


def _any_block(text: str) -> str:
    return re.sub(r"\.\d+\b", ".*", text)


def _as_text(result: DemoResult) -> str:
    trained = sum(layer.rank * sum(layer.shape) for layer in result.layers)
    ours = result.runs[0].seconds
    runs = [
        [
            run.name,
            *((f"{run.seconds:.3f}", f"{run.seconds / ours:.2f}") if run.failed is None else ("fails", "")),
            "" if run.energy_lost is None else f"{run.energy_lost:.1e}",
        ]
        for run in result.runs
    ]
    failures = [f"{run.name} fails: {run.failed}" for run in result.runs if run.failed is not None]
    verdict = "unchanged" if result.holds else "CHANGED"
    measured = ", measured on this model, which amplifies it," if result.rounding_measured else ""
    lines = [
        Report(layers=result.layers).table(),
        f"{result.model}: {len(result.layers)} layers, rank {result.rank}, {result.init}, {result.dtype}; "
        f"{trained:,} of {result.parameters:,} parameters in the adapter",
        result.machine,
        "",
        text_table(["get_peft_model with", "s", "× ours", "energy deficit, worst layer"], runs),
        *failures,
        "",
        *_as_lines("left out", result.left_out),
        *_as_lines("not called with these inputs, only the weights are compared", dict.fromkeys(result.not_called, "")),
        f"output {verdict}: relative difference {result.output_moved:.1e}, bound from {result.dtype} rounding"
        f"{measured} {result.output_allowed:.1e}; W_res + s·B·A equals W within {result.reconstruction:.2f} of the "
        "rounding bound",
    ]
    if result.saved_to is not None:
        lines.append(
            f"{result.saved_to}: the residual model, and its adapter in {result.saved_to}/{ADAPTER_FOLDER}; loaded by "
            f"plain transformers and PEFT, its output has a relative difference of {result.saved_moved:.1e}"
        )
    return "\n".join(lines)
