"""The command ``shards --predict``: seconds for whole models on GPUs. Nothing is measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import commands
from ..harness.table import formatted
from ..ledger.models import MODELS
from ..ledger.roofline import H100
from ..ledger.run import initialize, ledger, prediction
from .formulas import NETWORKS, counts_of, largest_part, memory, model_seconds
from .schedule import schedule_seconds

DEFAULT_MODELS = ("llama-2-70b", "llama-3.1-405b")
DETAILS = (
    "With --predict, nothing is measured: what the first process does is counted by running the code on small "
    "stand-ins with the spectra of real weights, and priced by the formulas of bench/shards/formulas.py for GPUs."
)
# Weights at a time where each process decomposes the whole model.
BATCH = 32
HEADERS = (
    "model",
    "rank",
    "whole model on one GPU, s",
    "copied from the CPU and back, s",
    *(f"{network.name}, s" for network in NETWORKS),
    *(f"{network.name}, one by one, s" for network in NETWORKS),
    *(f"{network.name}, GB each" for network in NETWORKS),
)


def forecast(name: str, rank: int) -> dict[str, Any]:
    """A row: seconds for the whole model on one GPU, and in shards, with the parts and the memory of each process.

    In shards, layers go through the schedule in batches. One by one, by the operator, go those that it does not solve;
    the parts are those of all layers doing so.
    """
    model = MODELS[name]
    whole = prediction(ledger(initialize, model, rank, BATCH, H100), model, H100)
    row: dict[str, Any] = {"predicted": True, "model": name, "rank": rank, "device": H100.name}
    row |= {"resident_s": whole["resident"], "streamed_s": whole["streamed"], "sharded": []}
    for network in NETWORKS:
        parts = model_seconds(model, rank, network)
        shard, beyond = memory(model, rank, network.processes)
        row["sharded"].append(
            {
                "processes": network.processes,
                "seconds": math.fsum(schedule_seconds(model, rank, network, BATCH).values()),
                "one_by_one_s": math.fsum(parts.values()),
                "parts": parts,
                "shard_bytes": shard,
                "extra_bytes": beyond,
            }
        )
    return row


def table(rows: Sequence[dict[str, Any]], style: str = "simple") -> str:
    """The rows as text."""
    lines = []
    for row in rows:
        times = [row["resident_s"], row["streamed_s"]]
        times += [each[kind] for kind in ("seconds", "one_by_one_s") for each in row["sharded"]]
        held = (f"{each['shard_bytes'] / 1e9:.1f} + {each['extra_bytes'] / 1e9:.1f}" for each in row["sharded"])
        lines.append((row["model"], str(row["rank"]), *(f"{seconds:.1f}" for seconds in times), *held))
    return formatted(lines, HEADERS, style)


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, DETAILS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(DEFAULT_MODELS), metavar="MODEL")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 128], metavar="R", help="ranks (default: 16 128)")
    parser.add_argument("--format", default="simple", help="format of the tabulate package; github for Markdown")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the predictions, as JSON lines")
    arguments = parser.parse_args(argv)
    print(f"A prediction for {H100.name}, not a measurement.")
    for network in NETWORKS:
        print(f"{network.name}: {network.latency * 1e6:.0f} µs a collective, {network.bus / 1e9:.0f} GB/s")
    rows = []
    for model in arguments.models:
        for rank in arguments.ranks:
            for shape in MODELS[model].shapes:
                counts = counts_of(shape, rank)
                total = sum(counts.requests.values())
                print(f"{model}, rank {rank}, {shape[0]}×{shape[1]}: {counts.method}, {total} requests", flush=True)
            row = forecast(model, rank)
            rows.append(row)
            for each in row["sharded"]:
                print(f"  {each['processes']} processes: {largest_part(each['parts'])}", flush=True)
    print(table(rows, arguments.format))
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0
