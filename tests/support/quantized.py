"""The iteration with exact SVDs, and PEFT's LoftQ. Nothing here calls the package but a scheme that is handed in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def exact_errors(
    weight: Tensor,
    rank: int,
    scaling: float,
    scheme: Any,
    iterations: int,
    *,
    noise: float = 0.0,
    seed: int = 0,
) -> list[float]:
    """‖W − W_q − s·B·A‖_F after each iteration, with float64 SVDs, and A and B rounded to the weight's dtype.

    Args:
        weight: (m, n).
        rank: r.
        scaling: s.
        scheme: quantizer.
        iterations: number of iterations.
        noise: standard deviation of a perturbation of each matrix before its SVD, relative to the matrix's own.
        seed: of the perturbation.
    """
    exact, left, errors = weight.double(), weight.double(), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        if noise:
            drawn = torch.randn(left.shape, generator=generator, dtype=torch.float64)
            left = left + noise * left.std() * drawn
        U, S, Vh = torch.linalg.svd(left, full_matrices=False)
        root = (S[:rank] / scaling).sqrt()
        A, B = ((root[:, None] * Vh[:rank]).to(weight.dtype), (U[:, :rank] * root).to(weight.dtype))
        residual = exact - scaling * (B.double() @ A.double())
        values = scheme.quantize(residual.float(), weight.dtype).dequantize().double()
        errors.append(float((residual - values).norm()))
        left = exact - values
    return errors


def plain_error(weight: Tensor, scheme: Any) -> Tensor:
    """W − Q(W), float64."""
    values: Tensor = scheme.quantize(weight.float().contiguous(), weight.dtype).dequantize().double()
    return weight.double() - values


def loftq_error(weight: Tensor, rank: int, iterations: int) -> Tensor:
    """W − W_q − B·A of PEFT's LoftQ with NF4, float64.

    ``loftq_init`` computes on a GPU, whatever the weight's device. Here its ".to('cuda')" goes to the CPU.
    """
    import bitsandbytes as bnb
    from peft.utils.loftq_utils import loftq_init

    with _on_cpu(torch.Tensor), _on_cpu(bnb.nn.Params4bit):
        values, A, B = loftq_init(weight, num_bits=4, reduced_rank=rank, num_iter=iterations)
    return weight.double() - values.double() - B.double() @ A.double()


@contextlib.contextmanager
def _on_cpu(cls: Any) -> Iterator[None]:
    moved: Callable[..., Any] = cls.to

    def to(tensor: Any, *args: Any, **settings: Any) -> Any:
        args = tuple("cpu" if value == "cuda" else value for value in args)
        return moved(tensor, *args, **{key: "cpu" if value == "cuda" else value for key, value in settings.items()})

    with mock.patch.object(cls, "to", to):
        yield
