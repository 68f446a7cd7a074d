"""The command line of whole checkpoints: ``init`` and ``verify``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..adapter.names import ADAPTER_FOLDER
from ..checkpoint.plan import CheckpointJob, plan_checkpoint
from ..checkpoint.run import init_checkpoint
from ..checkpoint.targets import AdapterOptions
from ..report.tables import text_table
from .arguments import initializer, pattern, positive, quiet_libraries

MIB = 2**20


def add_parser(commands: Any) -> None:
    """Declare ``init MODEL OUT``."""
    parser = commands.add_parser(
        "init",
        help="turn a checkpoint into its residual and a PiSSA adapter, without loading the model",
        description="Turn a checkpoint folder (config.json and safetensors) into OUT: the residual model, and its "
        "adapter in OUT/pissa_init, which plain transformers and PEFT load. One weight is in memory at a time; a run "
        "that was killed goes on with --resume. Under torchrun the weights are shared out over the ranks.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the checkpoint's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to be")
    parser.add_argument("--rank", type=positive, default=16, help="r of every layer (default 16)")
    parser.add_argument("--alpha", type=float, help="lora_alpha (default: the rank, for a scaling of 1)")
    parser.add_argument("--rslora", action="store_true", help="scale by alpha/√r, not alpha/r")
    parser.add_argument("--init", type=initializer, default="pissa", help="pissa (default) or pissa_niter_N")
    parser.add_argument("--seed", type=int, default=0, help="of the sketches (default 0)")
    parser.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME",
        help="module names, one regular expression, or all-linear (default), as PEFT takes them",
    )  # fmt: skip
    parser.add_argument("--exclude-modules", nargs="+", default=[], metavar="NAME", help="module names, or one regex")
    parser.add_argument(
        "--rank-pattern", nargs="+", default=[], type=pattern(int), metavar="NAME=R", help="ranks of single layers"
    )
    parser.add_argument(
        "--alpha-pattern", nargs="+", default=[], type=pattern(float), metavar="NAME=A", help="alphas of single layers"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where weights are decomposed")
    parser.add_argument("--workers", type=positive, metavar="N", help="weights at a time (default: cores; 2 on a GPU)")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run, if there is one")
    parser.add_argument("--force", action="store_true", help="replace a finished OUT, begin an unfinished one again")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each tensor, and one at the end")
    parser.set_defaults(run=run, interrupted="what is done is kept, and --resume goes on with it")


def run(arguments: argparse.Namespace) -> int:
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no CUDA device")
    options = AdapterOptions(
        rank=arguments.rank,
        alpha=arguments.alpha,
        init=arguments.init,
        seed=arguments.seed,
        target_modules=tuple(arguments.target_modules),
        exclude_modules=tuple(arguments.exclude_modules),
        rank_pattern=dict(arguments.rank_pattern),
        alpha_pattern=dict(arguments.alpha_pattern),
        use_rslora=arguments.rslora,
        trust_remote_code=arguments.trust_remote_code,
    )
    quiet_libraries()
    return _carry_out(arguments, plan_checkpoint(arguments.model, arguments.out, options, arguments.device))


def _carry_out(arguments: argparse.Namespace, plan: CheckpointJob) -> int:
    speaks = os.environ.get("RANK", "0") == "0"
    if plan.checkpoint.left_out and speaks:
        print(f"left out, as they hold weights that would not be residuals: {', '.join(plan.checkpoint.left_out)}",
              file=sys.stderr)  # fmt: skip
    if arguments.dry_run:
        if speaks:
            print(json.dumps(_plan_record(plan)) if arguments.json else _plan_text(plan))
        return 0
    on_tensor: Callable[[dict[str, Any]], None] | None = None
    if arguments.json:

        def on_tensor(record: dict[str, Any]) -> None:
            print(json.dumps({"event": "tensor", **record}), flush=True)

    outcome = init_checkpoint(
        plan,
        workers=arguments.workers,
        resume=arguments.resume,
        force=arguments.force,
        on_tensor=on_tensor,
        shown=not arguments.json,
    )
    if not speaks:
        return 0
    report = outcome.report
    if arguments.json:
        print(
            json.dumps(
                {
                    "event": "done",
                    "out": str(plan.out),
                    "tensors": outcome.done,
                    "kept": outcome.kept,
                    "layers": len(report.layers),
                    "seconds": report.seconds,
                    "peak_extra_bytes": report.peak_extra_bytes,
                    "converged": all(layer.certificate.converged for layer in report.layers),
                }
            )
        )
        return 0
    print(report.summary())
    if outcome.kept:
        print(f"{outcome.kept} of {outcome.kept + outcome.done} tensors had been done before")
    print(f"{plan.out}: the residual model ({plan.size / 1e9:.3g} GB), and its adapter in {plan.out}/{ADAPTER_FOLDER}")
    return 0


def _plan_record(plan: CheckpointJob) -> dict[str, Any]:
    targets = plan.adapter.targets
    return {
        "source": str(plan.checkpoint.folder),
        "out": str(plan.out),
        "bytes": plan.size,
        "adapter_bytes": plan.adapter_header.size,
        "worker_bytes": plan.workspace(),
        "core_seconds": sum(item.seconds for item in plan.items),
        "copied": [item.entry.name for item in plan.items if item.target is None],
        "files": list(plan.checkpoint.others),
        "left_out": list(plan.checkpoint.left_out),
        "targets": [
            {
                "name": target.name,
                "tensor": target.entry.name,
                "shard": target.shard,
                "shape": list(target.shape),
                "dtype": target.entry.dtype,
                "rank": target.rank,
                "scaling": target.scaling,
            }
            for target in targets
        ],
    }


def _plan_text(plan: CheckpointJob) -> str:
    """A row for each kind of target, and the sizes."""
    kinds: dict[tuple[str, ...], int] = {}
    for target in plan.adapter.targets:
        shape = "×".join(map(str, target.shape))
        kind = (target.name.rpartition(".")[2], shape, target.entry.dtype, str(target.rank), f"{target.scaling:g}")
        kinds[kind] = kinds.get(kind, 0) + 1
    rows = [[*kind, str(count)] for kind, count in kinds.items()]
    copied = [item for item in plan.items if item.target is None]
    return "\n".join(
        [
            text_table(["module", "shape", "dtype", "r", "scaling", "layers"], rows, [0, 2]),
            "",
            f"{len(plan.adapter.targets)} tensors become residuals, {len(copied)} are copied "
            f"({sum(item.entry.nbytes for item in copied) / 1e9:.3g} GB), {len(plan.checkpoint.others)} other files",
            f"{plan.out} takes {plan.size / 1e9:.3g} GB, of it {plan.adapter_header.size / MIB:.1f} MiB the adapter; "
            f"a worker takes up to {plan.workspace() / MIB:.0f} MiB",
            f"about {sum(item.seconds for item in plan.items):.0f} s of one core; nothing has been written",
        ]
    )
