"""The seconds that a sharded weight is expected to take on GPUs: every formula, from counts to a model.

The operations of the first process wait for one another, so that their times add up:

    seconds = Σ requests (launches·t + products + collectives)
            + Σ small operations max(t, bytes/memory, operations/rate, waiting steps)
            + Σ eigenproblems + random numbers/rate of a CPU + subtraction of s·B·A from the shard

t is the time of a launch. P processes have 1/P of the weight each. A product reads the shard once, or takes the
arithmetic of its bfloat16 pieces where that is longer. Nothing here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pissa_kernels.svd.cost import DENSE_FALLBACK_WIDTH, choose_plan, workspace
from pissa_kernels.svd.machines import MACHINES
from pissa_kernels.svd.sketches import KEPT_ELEMENTS

from ..ledger.events import Event
from ..ledger.models import Projections
from ..ledger.roofline import H100, Roofline
from .counts import Counts, Request, counted

# Bytes of an element of the weight and of a panel.
WEIGHT, PANEL = 2, 4
# Bytes of what announces a request.
HEADER = 32
# Products with the shard.
PRODUCTS = {"sum_of_squares": 1, "apply": 1, "adjoint": 1, "normal": 2, "project": 2, "compress": 1}
PRODUCTS |= {"stop": 0, "failures": 0}
# Kernels and copies of a request at most, as :mod:`pissa_kernels.svd.sharded` makes them: the header, which the others
# read; the pieces of a panel and a product; the place of a result among those of the others.
LAUNCHES = {"sum_of_squares": 4, "apply": 7, "adjoint": 5, "normal": 8, "project": 12, "compress": 6}
LAUNCHES |= {"stop": 2, "failures": 6}
# An SVD of a small matrix, in eigenproblems of that size: as the cost model has it.
EIGENPROBLEMS = {"eigh": 1.0, "svd": 2.4}
# Normal random numbers that torch draws in a second on a CPU, where the sketch is drawn: on an AMD EPYC.
DRAWN = 6e7
# Collectives of Python objects have two, the length and the bytes, and two copies each.
OBJECT_COLLECTIVES, OBJECT_COPIES = 2, 4
GPU = "cuda"


@dataclass(frozen=True)
class Network:
    """Processes, and what connects them. The rates are assumed.

    Attributes:
        name: in the table.
        processes: P.
        latency: seconds of the shortest collective.
        bus: bytes per second of a long one, in NCCL's bus bandwidth.
    """

    name: str
    processes: int
    latency: float
    bus: float


ONE_HOST = Network("8 processes", 8, latency=20e-6, bus=300e9)
EIGHT_HOSTS = Network("64 processes", 64, latency=40e-6, bus=40e9)
NETWORKS = (ONE_HOST, EIGHT_HOSTS)


def transfers(request: Request, m: int, n: int, divided_columns: bool) -> Iterator[tuple[str, int]]:
    """The collectives of a request, each with its bytes.

    Args:
        request: a request about A (m, n), m ≥ n.
        m, n: sides.
        divided_columns: whether the columns of A are divided among the processes, or its rows.
    """
    verb, k, _ = request
    yield "broadcast", HEADER
    if verb == "sum_of_squares":
        yield "reduce", 8
    if k:
        yield "broadcast", PANEL * k * (m if verb == "adjoint" else n)
        if divided_columns and verb in ("normal", "project", "compress"):
            yield "all_reduce", PANEL * k * m
        results = {"apply": m, "adjoint": n, "normal": n, "project": n + k, "compress": k}
        yield "reduce", PANEL * k * results[verb]


def collective(kind: str, size: float, network: Network) -> float:
    """Seconds of a collective of so many bytes."""
    P = network.processes
    return network.latency + size / network.bus * (2 * (P - 1) / P if kind == "all_reduce" else 1.0)


def product(request: Request, m: int, n: int, processes: int, roofline: Roofline) -> float:
    """Seconds of the products of a request with the shard."""
    elements = m * n / processes
    arithmetic = 2 * elements * request.columns * request.pieces / roofline.flops["bf16"]
    return PRODUCTS[request.verb] * max(WEIGHT * elements / roofline.memory, arithmetic)


def subtraction(m: int, n: int, rank: int, processes: int, roofline: Roofline) -> float:
    """Seconds in which each process subtracts s·B·A from its shard."""
    elements = m * n / processes
    arithmetic = 2 * elements * rank / roofline.flops["bf16"]
    return roofline.launch + max(2 * WEIGHT * elements / roofline.memory, arithmetic)


def operation(event: Event, m: int, n: int, roofline: Roofline) -> float:
    """Seconds of a small operation of the first process."""
    return max(roofline.launch, roofline.line(event, 1, {"batch": 1, "m": m, "n": n}).seconds)


def drawing(event: Event, m: int, n: int, roofline: Roofline) -> float:
    """Seconds in which a random matrix is drawn, and copied to the GPU; small ones are kept from one weight on."""
    size = sum(operand.bytes({"batch": 1, "m": m, "n": n}) for operand in event.operands)
    return (size / PANEL / DRAWN if size > PANEL * KEPT_ELEMENTS else 0.0) + size / roofline.bus


def message(kind: str, event: Event, m: int, n: int, network: Network, roofline: Roofline) -> float:
    """Seconds of a collective outside of requests: factors, certificates, whether a process has failed."""
    if not event.operands:
        return OBJECT_COLLECTIVES * network.latency + OBJECT_COPIES * roofline.launch
    size = sum(operand.bytes({"batch": 1, "m": m, "n": n}) for operand in event.operands)
    return collective(kind, size, network)


def weight_seconds(
    counts: Counts, shape: tuple[int, int], rank: int, network: Network, roofline: Roofline = H100
) -> dict[str, float]:
    """Seconds of one weight (out, in) whose rows are divided, by part."""
    m, n, P = max(shape), min(shape), network.processes
    wide = shape[0] < shape[1]
    requests = counts.requests.items()
    parts = {
        "products": sum(times * product(request, m, n, P, roofline) for request, times in requests),
        "collectives": sum(
            times * collective(kind, size, network)
            for request, times in requests
            for kind, size in transfers(request, m, n, wide)
        )
        + sum(
            times * message(kind, event, m, n, network, roofline) for (kind, event), times in counts.messages.items()
        ),
        "launches": roofline.launch * sum(times * LAUNCHES[request.verb] for request, times in requests),
        "small operations": sum(times * operation(event, m, n, roofline) for event, times in counts.operations.items()),
        "eigenproblems": sum(
            times * EIGENPROBLEMS[kind] * MACHINES[GPU].eigenproblem(size)
            for (kind, size), times in counts.dense.items()
        ),
        "sketch": sum(times * drawing(event, m, n, roofline) for event, times in counts.drawn.items()),
    }
    return parts | {"subtraction": subtraction(m, n, rank, P, roofline)}


def counts_of(shape: tuple[int, int], rank: int) -> Counts:
    """What is done for a weight (out, in), by the plan that the cost model has for it on a GPU."""
    m, n = max(shape), min(shape)
    plan = choose_plan(m, n, rank, None, machine=GPU, formed=n <= DENSE_FALLBACK_WIDTH)
    return counted(plan, shape[0] < shape[1], m == n, rank)


def model_seconds(model: Projections, rank: int, network: Network, roofline: Roofline = H100) -> dict[str, float]:
    """Seconds of all linear layers of a model, one after the other, by part."""
    total: dict[str, float] = {}
    for shape, count in model.shapes.items():
        for part, seconds in weight_seconds(counts_of(shape, rank), shape, rank, network, roofline).items():
            total[part] = total.get(part, 0.0) + count * seconds
    return total


def memory(model: Projections, rank: int, processes: int) -> tuple[float, float]:
    """Bytes of the shards in each process, and at most beyond them in the first one."""
    beyond = max(workspace(*shape, rank, None, machine=GPU) for shape in model.shapes)
    return model.bytes / processes, float(beyond)


def largest_part(parts: Mapping[str, float]) -> str:
    """The part that takes the longest, and its share in percent."""
    name, seconds = max(parts.items(), key=lambda pair: pair[1])
    return f"{name} {100 * seconds / math.fsum(parts.values()):.0f} %"
