"""The command: record the code, evaluate it for real models, print what a roofline predicts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from pissa_kernels.factors import Recipe
from pissa_kernels.ops import dispatch
from pissa_kernels.ops.batched import Weights
from pissa_kernels.pissa import principal_factors_of_batch
from pissa_kernels.svd import fixed

from .. import commands
from .events import UNITS, Event, Line, Sizes, linear
from .models import MODELS, Projections
from .recorder import recording
from .roofline import H100, Roofline
from .standin import StandIn

# Primes above every panel's width, so that a size that is a multiple of one of them is a weight's.
SMALL, LARGE = 521, 577
BATCHES = (11, 13)
Work = Callable[[list[Tensor], int], None]
DETAILS = (
    "Counts come from running the code on small stand-ins for weights on a GPU and are evaluated for a model's shapes. "
    "Each operation takes the longest of its memory traffic, its arithmetic, and its steps that wait for one another; "
    "the host launches one kernel after another at the same time. Nothing is measured: a run can refute the prediction."
)


def initialize(weights: list[Tensor], rank: int) -> None:
    """What an initializer does with a batch: its factors, and the residuals in place."""
    factors = principal_factors_of_batch(weights, [Recipe(rank)] * len(weights))
    batch, dtype = Weights.of(weights), weights[0].dtype
    B, A = (torch.stack([getattr(each, name) for each in factors]).to(dtype) for name in ("lora_B", "lora_A"))
    scalings = torch.ones(len(weights), dtype=torch.float64)
    dispatch.bodies(batch).subtract_lowrank_(batch, B, A, scalings)


def stand_ins(sizes: Sizes) -> list[StandIn]:
    """Weights whose singular values fall as j^(−0.3); the fixed schedule resolves them without further filters."""
    generator = torch.Generator().manual_seed(0)
    k = min(sizes.m, sizes.n)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator))[0] for size in (sizes.m, sizes.n))
    weight = (U * torch.arange(1, k + 1) ** -0.3) @ V.mT
    return [StandIn(weight.bfloat16()) for _ in range(sizes.batch)]


@functools.cache
def recorded(work: Work, kind: str, rank: int) -> dict[Event, tuple[float, float]]:
    """Events of a batch of k weights, as (a, b) of a + b·k occurrences.

    Args:
        work: what is done with a list of weights at a rank.
        kind: "tall", "square" or "wide".
        rank: r.
    """
    m, n = {"tall": (LARGE, SMALL), "square": (SMALL, SMALL), "wide": (SMALL, LARGE)}[kind]
    found = []
    for batch in BATCHES:
        sizes = Sizes(batch, m, n)
        weights: list[Tensor] = list(stand_ins(sizes))
        with recording(sizes) as record:
            work(weights, rank)
        found.append(record.events)
    return linear(found[0], found[1], BATCHES)


def ledger(work: Work, model: Projections, rank: int, batch: int, roofline: Roofline) -> dict[str, Line]:
    """Lines by part of the code, for all weights of a model, at most ``batch`` at a time."""
    lines: dict[str, Line] = {}
    for (m, n), count in model.shapes.items():
        kind = "square" if m == n else "tall" if m > n else "wide"
        events = recorded(work, kind, rank)
        for members, repeats in ((batch, count // batch), (count % batch, 1)):
            if members:
                for event, (fixed, each) in events.items():
                    times = repeats * max(0.0, fixed + each * members)
                    line = roofline.line(event, times, {"batch": members, "m": m, "n": n})
                    lines[event.part] = lines.get(event.part, Line()) + line
    return lines


def prediction(lines: dict[str, Line], model: Projections, roofline: Roofline) -> dict[str, float]:
    """Predicted seconds: of the GPU, of the host's launches, of both, and with every weight over the bus and back."""
    device = sum(line.seconds for line in lines.values())
    host = roofline.launch * sum(line.launches for line in lines.values())
    # the bus carries both directions at once
    bus = model.bytes / roofline.bus
    return {"device": device, "host": host, "resident": max(device, host), "streamed": max(device, host, bus)}


def table(lines: dict[str, Line]) -> str:
    """The ledger as text, the longest parts first, and their sum."""
    total = sum(lines.values(), Line())
    ordered = sorted(lines.items(), key=lambda pair: -pair[1].seconds)
    rows = [(name, *_cells(line)) for name, line in [*ordered, ("sum", total)]]
    headers = ("part", "launches", "waits", "GB", "GB over the bus", *(f"TFLOP {unit}" for unit in UNITS), "ms")
    return str(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1))))


def _cells(line: Line) -> tuple[str, ...]:
    figures = (line.bytes / 1e9, line.transferred / 1e9, *(line.flops.get(unit, 0) / 1e12 for unit in UNITS))
    return (
        f"{line.launches:.0f}",
        f"{line.waits:.0f}",
        *(f"{figure:.3g}" for figure in figures),
        f"{1e3 * line.seconds:.1f}",
    )


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, DETAILS)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=", ".join(MODELS)
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 128], metavar="R", help="ranks (default: 16 128)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="weights at a time (default: 32)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the predictions, as JSON lines")
    arguments = parser.parse_args(argv)
    for rank in arguments.ranks:
        if not 1 <= rank <= max(fixed.SCHEDULES):
            parser.error(f"rank {rank} has no fixed schedule, whose counts do not depend on values; ranks are 1 to 256")
    print(f"{H100.name}: {H100.memory / 1e12:.2f} TB/s, ", end="")
    print(", ".join(f"{unit} {rate / 1e12:.0f}" for unit, rate in H100.flops.items()), "TFLOP/s,", end=" ")
    print(f"{H100.launch * 1e6:.0f} µs a launch, bus {H100.bus / 1e9:.0f} GB/s; {arguments.batch} weights at a time")
    found = []
    for model in arguments.models:
        for rank in arguments.ranks:
            lines = ledger(initialize, MODELS[model], rank, arguments.batch, H100)
            seconds = prediction(lines, MODELS[model], H100)
            row = {"model": model, "rank": rank, "batch": arguments.batch, "device": H100.name}
            found.append(row | {f"{kind}_s": value for kind, value in seconds.items()})
            print(f"\n{model}, rank {rank}, {sum(MODELS[model].shapes.values())} weights\n{table(lines)}")
            print(", ".join(f"{kind} {1e3 * value:.0f} ms" for kind, value in seconds.items()), flush=True)
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return 0
