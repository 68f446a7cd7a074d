"""The providers: triplets of a weight that several processes hold, behind one signature.

Every process calls a provider. Where only the first one has the triplets, the others return None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pissa_kernels as pk


@dataclass(frozen=True, eq=False)
class Held:
    """What a process has of a weight.

    Attributes:
        weight: the weight as a ``DTensor``.
        whole: (out, in) in the first process, None in the others.
        processes: number of processes.
    """

    weight: Any
    whole: Tensor | None
    processes: int


Provider = Callable[[Held, int], pk.TruncatedSVD | None]


def on_shards(held: Held, rank: int) -> pk.TruncatedSVD | None:
    """This package, on the shards."""
    return pk.truncated_svd(held.weight, rank)


def on_gathered(held: Held, rank: int) -> pk.TruncatedSVD | None:
    """What a user would write: gather the weight in every process, and decompose it in every process."""
    return pk.truncated_svd(held.weight.full_tensor(), rank)


def in_one_process(held: Held, rank: int) -> pk.TruncatedSVD | None:
    """The whole weight in the first process, with a thread for each process that there is a core for."""
    if held.whole is None:
        return None
    torch.set_num_threads(min(held.processes, len(os.sched_getaffinity(0))))
    try:
        return pk.truncated_svd(held.whole, rank)
    finally:
        torch.set_num_threads(1)


OURS, GATHERED, ALONE = "ours on shards", "full_tensor, then truncated_svd", "one process, its threads"
PROVIDERS: dict[str, Provider] = {OURS: on_shards, GATHERED: on_gathered, ALONE: in_one_process}
