"""``pissa-kernels init``: turn a checkpoint into its residual and a PiSSA adapter."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from ..adapter.names import ADAPTER_FOLDER
from ..adapter.patterns import matches
from ..checkpoint.options import AdapterOptions, check_expression, default_modules, entries
from ..checkpoint.outcome import CheckpointReport
from ..checkpoint.plan import CheckpointJob, plan_checkpoint
from ..checkpoint.quantization import BLOCKS, DEFAULT_BLOCK, FORMATS, quantization_options
from ..checkpoint.run import init_checkpoint
from ..quantize.iteration import DEFAULT_ITERATIONS, Iterations
from .arguments import checked, initializer, pattern, positive, quiet_libraries
from .plan import plan_record, plan_text
from .streams import output

DESCRIPTION = """\
Split the checkpoint in the folder MODEL (config.json and safetensors) into a
residual checkpoint, OUT, and its PiSSA adapter, OUT/pissa_init. Plain
transformers and PEFT load both. The model is not loaded: each worker holds one
weight at a time. With --quantize, OUT is a pre-quantized bitsandbytes
checkpoint. OUT appears once it is complete; --resume continues a run that was
interrupted. Started with torchrun on one host or on several that share OUT's
folder, the processes share the work; if one is lost, all end, and any number
of processes can resume."""
EXAMPLES = """\
examples:
  pissa-kernels init MODEL OUT --dry-run
  pissa-kernels init MODEL OUT --rank 32 --target-modules q_proj v_proj
  pissa-kernels init MODEL OUT --target-parameters gate_up_proj down_proj
  pissa-kernels init MODEL OUT --rank 64 --quantize nf4 --double-quant
  torchrun --nproc-per-node 8 -m pissa_kernels init MODEL OUT --resume"""


def add_parser(commands: Any) -> None:
    """Declare ``init MODEL OUT``."""
    parser = commands.add_parser(
        "init",
        help="split a checkpoint into its residual and a PiSSA adapter, without loading the model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the result")
    _add_adapter_options(parser.add_argument_group("adapter, as for PEFT's LoraConfig"))
    _add_quantization_options(parser.add_argument_group("quantization"))
    group = parser.add_argument_group("run")
    group.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where weights are decomposed (default: cpu)"
    )
    group.add_argument(
        "--workers", type=positive, metavar="N",
        help="number of weights at a time (default: torch's number of threads; 2 on a GPU)",
    )  # fmt: skip
    group.add_argument(
        "--resume", action="store_true", help="continue an unfinished run with the same options, if there is one"
    )
    group.add_argument(
        "--force", action="store_true",
        help="replace an OUT that init has made, at the end; without --resume, start an unfinished run again",
    )  # fmt: skip
    group.add_argument("--dry-run", action="store_true", help="print the plan with its sizes, and write nothing")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code of MODEL to build its model")
    group.add_argument("--json", action="store_true", help="print a JSON object per tensor, and one at the end")
    parser.set_defaults(run=run, interrupted="finished tensors are kept, and --resume continues the run")


def _add_adapter_options(group: Any) -> None:
    group.add_argument("--rank", type=positive, default=16, metavar="R", help="rank of every layer (default: 16)")
    group.add_argument("--alpha", type=float, metavar="A", help="lora_alpha (default: the rank, for a scaling of 1)")
    group.add_argument("--rslora", action="store_true", help="scale by alpha/√r instead of alpha/r")
    group.add_argument(
        "--init", type=initializer, default="pissa", metavar="INIT",
        help="pissa, or pissa_niter_N, at least as accurate as N rounds of torch.svd_lowrank (default: pissa)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random sketches (default: 0)")
    group.add_argument(
        "--target-modules", nargs="+", action="extend", type=_module, metavar="NAME",
        help="names of the modules to adapt, all-linear among them or alone, or one regular expression "
        "(default: all-linear, or none with --target-parameters)",
    )  # fmt: skip
    group.add_argument(
        "--target-parameters", nargs="+", action="extend", metavar="NAME",
        help="names, or their ends, of parameters that are stacks of matrices, as experts.gate_up_proj "
        "experts.down_proj: each expert gets factors of its own (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--exclude-modules", nargs="+", action="extend", type=_module, metavar="NAME",
        help="names of modules to leave out, or one regular expression (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--rank-pattern", nargs="+", action=_Pattern, type=pattern(int), metavar="NAME=R",
        help="ranks of single modules, as in down_proj=8",
    )  # fmt: skip
    group.add_argument(
        "--alpha-pattern", nargs="+", action=_Pattern, type=pattern(float), metavar="NAME=A",
        help="alphas of single modules, as in down_proj=16",
    )  # fmt: skip


def _add_quantization_options(group: Any) -> None:
    group.add_argument(
        "--quantize", choices=FORMATS,
        help="store the layers that transformers would quantize with bitsandbytes in this format",
    )  # fmt: skip
    group.add_argument("--double-quant", action="store_true", help="quantize the scales of nf4 and fp4 too")
    group.add_argument(
        "--quant-block", type=int, choices=BLOCKS, default=DEFAULT_BLOCK, metavar="N",
        help="elements that share a scale in nf4 and fp4 (default: 64)",
    )  # fmt: skip
    group.add_argument(
        "--quant-iterations", type=_iterations, default=DEFAULT_ITERATIONS, metavar="N",
        help="alternations of SVD and quantization, or auto for as many as gain half a percent each (default: 5)",
    )  # fmt: skip
    group.add_argument(
        "--nuclear", action="store_true", help="report nuclear norms of the quantization errors; two full SVDs a layer"
    )


def _iterations(text: str) -> Iterations:
    """A number of iterations, or auto."""
    return "auto" if text == "auto" else positive(text)


def _module(text: str) -> str:
    """A name of modules, or a regular expression."""
    return str(checked(text, check_expression))


class _Pattern(argparse.Action):
    """Collects NAME=VALUE in a dict. The names are regular expressions, and each is given once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = dict(getattr(namespace, self.dest) or {})
        for name, value in values:
            if name in found:
                raise argparse.ArgumentError(self, f"{name!r} is given twice")
            try:
                matches(name, "")
            except ValueError as error:
                raise argparse.ArgumentError(self, str(error)) from None
            found[name] = value
        setattr(namespace, self.dest, found)


def run(arguments: argparse.Namespace) -> int:
    """Initialize the checkpoint, or print the plan."""
    quiet_libraries()
    parameters = entries("target_parameters", arguments.target_parameters)
    options: dict[str, Any] = {
        "rank": arguments.rank,
        "alpha": arguments.alpha,
        "init": arguments.init,
        "seed": arguments.seed,
        "target_modules": entries("target_modules", arguments.target_modules, default_modules(parameters)),
        "target_parameters": parameters,
        "exclude_modules": entries("exclude_modules", arguments.exclude_modules),
        "rank_pattern": arguments.rank_pattern or {},
        "alpha_pattern": arguments.alpha_pattern or {},
        "use_rslora": arguments.rslora,
        "trust_remote_code": arguments.trust_remote_code,
    }
    quantization: dict[str, Any] = {
        "quantize": arguments.quantize,
        "double_quant": arguments.double_quant,
        "quant_block": arguments.quant_block,
        "quant_iterations": arguments.quant_iterations,
        "nuclear": arguments.nuclear,
    }
    first = os.environ.get("RANK", "0") == "0"  # one of the processes of torchrun prints

    def announce(job: CheckpointJob) -> None:
        for note in job.notes() if first else ():
            print(note, file=sys.stderr)

    def print_tensor(record: dict[str, Any]) -> None:
        output(json.dumps({"event": "tensor", **record}))

    if arguments.dry_run:
        quantize = quantization_options(**quantization)
        job = plan_checkpoint(arguments.model, arguments.out, AdapterOptions(**options), arguments.device, quantize)
        announce(job)
        if first:
            output(json.dumps(plan_record(job)) if arguments.json else plan_text(job))
        return 0
    report = init_checkpoint(
        arguments.model,
        arguments.out,
        **options,
        **quantization,
        device=arguments.device,
        workers=arguments.workers,
        resume=arguments.resume,
        force=arguments.force,
        progress=not arguments.json,
        on_plan=announce,
        on_tensor=print_tensor if arguments.json else None,
    )
    if first:
        output(json.dumps(_as_json(report)) if arguments.json else _as_text(report))
    return 0


def _as_json(report: CheckpointReport) -> dict[str, Any]:
    return {
        "event": "done",
        "out": str(report.out),
        "tensors": report.written,
        "kept": report.kept,
        "layers": len(report.layers),
        "seconds": report.seconds,
        "peak_extra_bytes": report.peak_extra_bytes,
        "converged": all(layer.certificate.converged for layer in report.layers),
        "left_out": list(report.left_out),
        "layers_left_out": dict(report.layers_left_out),
        "notes": list(report.notes),
        "quantization": _errors(report),
    }


def _as_text(report: CheckpointReport) -> str:
    lines = [report.summary()]
    if report.kept:
        lines.append(f"{report.kept} of {report.kept + report.written} tensors had been written by an earlier run")
    size = f"{report.size / 1e9:.3g} GB"
    lines.append(f"{report.out}: the residual model ({size}), and its adapter in {report.out}/{ADAPTER_FOLDER}")
    return "\n".join(lines)


def _errors(report: CheckpointReport) -> dict[str, Any] | None:
    """The quantization errors of all layers together: roots of the sums of their squares."""
    found = [layer.quantization for layer in report.layers if layer.quantization is not None]
    if not found:
        return None
    errors = {name: math.hypot(*(getattr(layer, name) for layer in found)) for name in ("error", "error_without")}
    return {"scheme": found[0].scheme, **errors}
