"""One of the processes that hold a weight: gate, time, and traffic or peak memory of each provider.

``python -m bench.shards.worker FOLDER PROCESS``: the folder has the job and the weight, and gets what is found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import pissa_kernels as pk

from ..harness.gate import PISSA_LIMIT, above, reference, subspace_deficit
from ..harness.resident import peak_of
from ..initializers.gate import SLACK
from .providers import PROVIDERS, Held, Provider
from .traffic import Traffic

TIMEOUT = timedelta(minutes=5)
# Weight on which providers run before memory is measured: large enough for the methods of the large one.
SMALL = (1024, 1280)


@dataclass
class Found:
    """What is found about a provider.

    Attributes:
        reason: why it is not timed; None if it passed the gate.
        energy_deficit: None where it failed.
        first_seconds: of the first run, in the slowest process.
        seconds: of each timed run, in the slowest process.
        bytes: that a process gives to collectives or gets from them, in the process with the most.
        collectives: of that process.
        peak_extra_mib: growth of the resident set, in the process with the most.
    """

    reason: str | None = None
    energy_deficit: float | None = None
    first_seconds: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    bytes: int = 0
    collectives: int = 0
    peak_extra_mib: float | None = None


def held(weight: Tensor, dim: int) -> Held:
    """This process's part of a weight, and the whole in the first process."""
    world, process = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    rows = weight.shape[dim] // world
    local = weight.narrow(dim, process * rows, rows).clone()
    stride = (weight.shape[1], 1)
    sharded = DTensor.from_local(
        local.contiguous(), mesh, [Shard(dim)], run_check=False, shape=weight.shape, stride=stride
    )
    return Held(sharded, weight.clone() if process == 0 else None, world)


def gated(provider: Provider, weight: Held, rank: int) -> Found:
    """The first run of a provider, compared with float64 and between the processes."""
    found, svd = Found(), None
    dist.barrier()
    began = time.perf_counter()
    try:
        with Traffic() as traffic:
            svd = provider(weight, rank)
        found.bytes, found.collectives = traffic.bytes, traffic.collectives
    except Exception as error:
        found.reason = f"raised {type(error).__name__}"
        print(error, file=sys.stderr)
    found.first_seconds = _largest(time.perf_counter() - began)
    outcomes = _everywhere((found.reason, digest(svd), (found.bytes, found.collectives)))
    found.bytes, found.collectives = max(counted for _, _, counted in outcomes)
    raised = next((reason for reason, _, _ in outcomes if reason), None)
    if weight.whole is not None and svd is not None and raised is None:
        truth = reference(weight.whole)
        found.energy_deficit = subspace_deficit(truth.weight, svd.Vh, truth.optimum(rank))
    found.energy_deficit = _everywhere(found.energy_deficit)[0]
    found.reason = raised or rejection(found.energy_deficit, [bits for _, bits, _ in outcomes])
    return found


def rejection(deficit: float | None, digests: list[str | None]) -> str | None:
    """Why a provider may not be timed, or None.

    Args:
        deficit: energy deficit.
        digests: of the triplets of each process; None for a process that has none.
    """
    if deficit is None or not deficit >= -SLACK:
        return "captures more energy than the optimum, or none that is known"
    if len({bits for bits in digests if bits is not None}) != 1:
        return "the processes have different triplets"
    return above("energy deficit", deficit, PISSA_LIMIT)


def digest(svd: pk.TruncatedSVD | None) -> str | None:
    """A hash of the bits of the triplets."""
    if svd is None:
        return None
    content = hashlib.sha256()
    for factor in svd[:3]:
        content.update(factor.contiguous().numpy().data)
    return content.hexdigest()


def timed(run: Callable[[], object]) -> float:
    """Seconds until the slowest process is done; all begin together."""
    dist.barrier()
    began = time.perf_counter()
    run()
    return _largest(time.perf_counter() - began)


def measure_times(job: dict[str, Any], weight: Held) -> dict[str, Found]:
    """Gate all providers, then time in turn those that passed."""
    found = {name: gated(PROVIDERS[name], weight, job["rank"]) for name in job["providers"]}
    passed = [name for name, each in found.items() if each.reason is None]
    for turn in range(job["repeats"] + 1):
        for name in passed:
            seconds = timed(partial(PROVIDERS[name], weight, job["rank"]))
            if turn:  # the first one warms up
                found[name].seconds.append(seconds)
    return found


def measure_memory(job: dict[str, Any], weight: Held) -> dict[str, Found]:
    """Peak memory of each provider, after a run on a small weight."""
    generator = torch.Generator().manual_seed(0)
    small = held(torch.randn(SMALL, generator=generator).to(weight.weight.dtype), job["dim"])
    found = {}
    for name in job["providers"]:
        PROVIDERS[name](small, min(job["rank"], 64))
    for name in job["providers"]:
        dist.barrier()
        peak = peak_of(partial(PROVIDERS[name], weight, job["rank"]))
        largest = _largest(math.nan if peak is None else peak)
        found[name] = Found(peak_extra_mib=None if math.isnan(largest) else largest)
    return found


def _everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _largest(value: float) -> float:
    return float(max(_everywhere(value)))


def main(folder: str, process: int) -> None:
    job = json.loads(Path(folder, "job.json").read_text())
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, world_size=job["processes"], rank=process, timeout=TIMEOUT)
    weight = held(torch.load(Path(folder, "weight.pt"), mmap=True), job["dim"])
    found = (measure_memory if job["memory"] else measure_times)(job, weight)
    if process == 0:
        Path(folder, "found.json").write_text(
            json.dumps({name: dataclasses.asdict(each) for name, each in found.items()})
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
