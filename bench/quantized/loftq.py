"""LoftQ as PEFT has it (Li et al., arXiv 2310.08659), on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def loftq(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """W_q, A and B with NF4 in blocks of 64.

    PEFT's ``loftq_init`` computes on a GPU wherever the weight is. Here its ``.to("cuda")`` goes to the CPU.
    """
    import bitsandbytes as bnb
    from peft.utils.loftq_utils import loftq_init

    with _on_cpu(torch.Tensor), _on_cpu(bnb.nn.Params4bit):
        values, lora_A, lora_B = loftq_init(weight, num_bits=4, reduced_rank=rank, num_iter=iterations)
    return values, lora_A, lora_B


@contextlib.contextmanager
def _on_cpu(cls: Any) -> Iterator[None]:
    moved = cls.to

    def to(tensor: Any, *args: Any, **settings: Any) -> Any:
        places = ["cpu" if value == "cuda" else value for value in args]
        return moved(tensor, *places, **{key: "cpu" if value == "cuda" else value for key, value in settings.items()})

    with mock.patch.object(cls, "to", to):
        yield
