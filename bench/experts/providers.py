"""The providers: A and B of every expert of a stack, which becomes the residual, behind one signature."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pissa_kernels import ops
from pissa_kernels.factors import Factors, Recipe
from pissa_kernels.numerics import exact_arithmetic
from pissa_kernels.pissa import principal_factors
from pissa_kernels.runtime.workers import run_jobs

from ..initializers.providers import ADAPTER, SCALING, lora_layer

CPU = torch.device("cpu")
OURS, FULL_SVDS = "ours pissa", "torch.linalg.svd loop"


class Pair(NamedTuple):
    """The adapter of one expert.

    Attributes:
        lora_A: (r, in) float32, as PEFT keeps the adapters of bfloat16 models.
        lora_B: (out, r) float32.
    """

    lora_A: Tensor
    lora_B: Tensor


# A stack (E, out, in), which becomes the residual, and the rank.
Provider = Callable[[Tensor, int], list[Pair]]


def ours(init: str) -> Provider:
    """This package, one expert a thread."""

    def initialize(stack: Tensor, rank: int) -> list[Pair]:
        recipe, threads = Recipe(rank, SCALING, init), torch.get_num_threads()
        found: dict[int, Factors] = {}
        jobs = [functools.partial(_expert, stack[index], recipe, index) for index in range(len(stack))]
        try:
            run_jobs(jobs, threads, lambda item: found.update([item]))
        finally:
            torch.set_num_threads(threads)
        return [Pair(found[index].lora_A, found[index].lora_B) for index in range(len(stack))]

    return initialize


def _expert(weight: Tensor, recipe: Recipe, index: int, emit: Callable[[tuple[int, Factors]], None]) -> None:
    torch.set_num_threads(1)
    with exact_arithmetic(CPU):
        factors = principal_factors(weight, recipe, torch.float32)
        ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, recipe.scaling)
    emit((index, factors))


def peft(init: str) -> Provider:
    """PEFT's initializer of a linear layer, expert by expert with all threads."""
    from peft.tuners.lora.layer import LoraLayer

    initializer: Callable[[Any, str, str], None] = LoraLayer.pissa_init

    def initialize(stack: Tensor, rank: int) -> list[Pair]:
        layer, pairs = lora_layer(stack[0], rank, False), []
        for weight in stack:
            layer.get_base_layer().weight.data = weight
            initializer(layer, ADAPTER, init)
            weight.copy_(layer.get_base_layer().weight.data)
            factors = (layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data)
            pairs.append(Pair(*(factor.float() for factor in factors)))
        return pairs

    return initialize


def full_svds(stack: Tensor, rank: int) -> list[Pair]:
    """A full SVD of each expert, then what PEFT does with it."""
    pairs = []
    for weight in stack:
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        root = (S[:rank] / SCALING).sqrt()
        pair = Pair(root[:, None] * Vh[:rank], U[:, :rank] * root)
        weight.copy_(weight.float() - SCALING * (pair.lora_B @ pair.lora_A))
        pairs.append(pair)
    return pairs


PROVIDERS: dict[str, Callable[[], Provider]] = {
    OURS: lambda: ours("pissa"),
    "ours pissa_niter_4": lambda: ours("pissa_niter_4"),
    "peft pissa_niter_4 loop": lambda: peft("pissa_niter_4"),
    FULL_SVDS: lambda: full_svds,
}
# What "ours pissa_niter_4" has to be as accurate as.
BASELINES = {"ours pissa_niter_4": "peft pissa_niter_4 loop"}
