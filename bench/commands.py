"""The commands of ``python -m bench``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: module in this package; its function ``main`` takes the command's name and arguments.
        summary: line in ``python -m bench --help``.
    """

    module: str
    summary: str


BENCHMARKS = {
    "init": Command("initializers.run", "initializers on 4096×4096 and on real 384-wide weights"),
    "engine": Command("initializers.run", "initializers over shapes, ranks and spectra"),
    "shapes": Command("initializers.run", "initializers on rectangular weights and a Conv1D"),
    "small": Command("initializers.run", "initializers on small weights and at high ranks"),
    "real": Command("initializers.run", "initializers on the 36 linear weights of all-MiniLM-L6-v2"),
    "quick": Command("initializers.run", "initializers on three small weights, within seconds"),
    "kernels": Command("kernels.run", "kernels: transpose, subtraction and products, as a share of the copy rate"),
    "model": Command("models.run", "whole models: get_peft_model on a Llama-shaped model"),
    "checkpoint": Command("checkpoints.run", "whole checkpoints: pissa-kernels init on a Llama-shaped checkpoint"),
    "quantized": Command("quantized.run", "quantized residuals: times beside full SVDs, errors beside LoftQ"),
    "experts": Command("experts.run", "stacks of experts: their adapters, beside loops of PEFT's initializer"),
    "shards": Command("shards.run", "weights in shards: several processes that hold one weight; predictions for GPUs"),
    "cold-start": Command("kernels.cold_start", "first kernel calls of a fresh process"),
    "gpu": Command("gpu.run", "what a GPU can show, in order of worth, within some minutes"),
}
TOOLS = {
    "table": Command("tools.table", "print rows as a table"),
    "plot": Command("tools.plot", "plot accuracy against time"),
    "split": Command("tools.split", "split the time of truncated_svd into its parts"),
    "calibrate": Command("tools.calibrate", "measure the constants of the cost model on this CPU"),
    "compiled": Command(
        "tools.compiled", "compile every GPU kernel without a GPU and check registers, spills and instructions"
    ),
    "schedule": Command("tools.schedule", "energy deficits of the GPU's schedule on known spectra, without a GPU"),
    "ledger": Command("ledger.run", "count launches, waits, bytes and operations of the GPU path, without a GPU"),
    "search": Command("gpu.search", "search launch parameters of the Triton kernels for this GPU"),
}
COMMANDS = BENCHMARKS | TOOLS


def parser(name: str, details: str = "") -> argparse.ArgumentParser:
    """A parser for the arguments of one command.

    Args:
        name: name of the command.
        details: sentences after its summary.
    """
    summary = COMMANDS[name].summary
    description = f"{summary[0].upper()}{summary[1:]}. {details}".strip()
    return argparse.ArgumentParser(prog=f"python -m bench {name}", description=description)
