"""What is measured: W_q, A and B by several methods."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pissa_kernels import decompose
from pissa_kernels.factors import Recipe
from pissa_kernels.quantize import iteration
from pissa_kernels.quantize.bnb import FourBit
from pissa_kernels.quantize.iteration import quantized_factors
from pissa_kernels.svd.warm import WarmStart

from .loftq import loftq


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result for one weight, with scaling 1.

    Attributes:
        values: (m, n) W_q; None for a method that does not quantize.
        lora_A, lora_B: (r, n) and (m, r); None for plain quantization.
        svd_seconds: time in SVDs, where it is known.
        reported: ‖W − W_q − B·A‖_F as the method reports it; None if it does not.
    """

    values: Tensor | None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    svd_seconds: float | None = None
    reported: float | None = None

    def error(self, weight: Tensor) -> Tensor:
        """W − W_q − B·A, float64."""
        assert self.values is not None
        left = weight.double() - self.values.double()
        return (
            left if self.lora_A is None or self.lora_B is None else left - self.lora_B.double() @ self.lora_A.double()
        )


# Weight, rank, format, number of iterations.
Provider = Callable[[Tensor, int, FourBit, int], Outcome]


def qpissa(weight: Tensor, rank: int, scheme: FourBit, iterations: int) -> Outcome:
    """This package's iteration."""
    with _timed_svds() as seconds:
        found = quantized_factors(weight, Recipe(rank), scheme, iterations)
    return Outcome(
        found.packed.dequantize(), found.lora_A, found.lora_B, sum(seconds), reported=found.quantization.error
    )


def pissa(weight: Tensor, rank: int, scheme: FourBit, iterations: int) -> Outcome:
    """This package's initialization without quantization, to compare times with."""
    found = decompose(weight, rank)
    return Outcome(None, found.lora_A, found.lora_B)


def full_svds(weight: Tensor, rank: int, scheme: FourBit, iterations: int) -> Outcome:
    """The iteration with torch.linalg.svd in float32; A and B rounded to the weight's dtype."""
    wide = weight.float()
    left, seconds = wide, 0.0
    for _ in range(iterations):
        began = time.perf_counter()
        U, S, Vh = torch.linalg.svd(left, full_matrices=False)
        seconds += time.perf_counter() - began
        root = S[:rank].sqrt()
        lora_A = (root[:, None] * Vh[:rank]).to(weight.dtype).float()
        lora_B = (U[:, :rank] * root).to(weight.dtype).float()
        values = scheme.quantize(wide - lora_B @ lora_A, weight.dtype).dequantize()
        left = wide - values
    return Outcome(values, lora_A, lora_B, seconds)


def peft_loftq(weight: Tensor, rank: int, scheme: FourBit, iterations: int) -> Outcome:
    """LoftQ from PEFT."""
    return Outcome(*loftq(weight, rank, iterations))


def qlora(weight: Tensor, rank: int, scheme: FourBit, iterations: int) -> Outcome:
    """Q(W), as QLoRA has it."""
    return Outcome(scheme.quantize(weight.float(), weight.dtype).dequantize())


PROVIDERS: dict[str, Provider] = {
    "ours qpissa": qpissa,
    "ours pissa": pissa,
    "torch.linalg.svd": full_svds,
    "peft loftq": peft_loftq,
    "qlora": qlora,
}


@contextlib.contextmanager
def _timed_svds() -> Iterator[list[float]]:
    """Seconds of each SVD of :func:`quantized_factors` in the block."""
    seconds: list[float] = []

    def timed(solve: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            try:
                return solve(*args, **settings)
            finally:
                seconds.append(time.perf_counter() - began)

        return call

    with (
        mock.patch.object(iteration, "solve_batch", timed(iteration.solve_batch)),  # type: ignore[attr-defined]
        mock.patch.object(WarmStart, "solve", timed(WarmStart.solve)),
    ):
        yield seconds
