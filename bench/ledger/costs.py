"""What each operation of :mod:`pissa_kernels.ops.batched` costs as a kernel: operands, operations, launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pissa_kernels.ops.batched import Panel, Update, Weights
from pissa_kernels.ops.triton import jacobi

from .events import Dim, Event, Operand, Sizes

# Operations of a Jacobi eigensolver per n³: eight sweeps of n²/2 rotations, each of two rows, two columns and two
# eigenvectors, with six operations for a pair of elements.
EIGH_FLOPS = 72
# Sweeps until random matrices have converged. The launches of the others return at once.
EIGH_SWEEPS = 8
# Steps of a round: the rotations of a subproblem, and what reads and writes it.
ROUND_STEPS = jacobi.SMALL + 8
# Factorization and inverse, a third of n³ each, multiplications and additions.
CHOLESKY_FLOPS = 2
Costs = Callable[..., Iterator[Event]]


def product(
    sizes: Sizes,
    results: Panel,
    left: Weights | Panel | Tensor,
    right: Panel | Tensor,
    *,
    precision: int,
    update: Update | None = None,
    **_: Any,
) -> Iterator[Event]:
    """One kernel. bfloat16 weights are multiplied by the pieces of a panel, other weights once or three times in TF32.

    p pieces of a panel and p of another one have p·(p + 1)/2 products above the last piece.
    """
    part, unit, times = "products with weights", "bf16", precision
    if not isinstance(left, Weights):
        part, times = "products of panels", precision * (precision + 1) // 2
        source, splits = pieces_of(sizes, left, precision)
        yield from splits
        read, splits = pieces_of(sizes, right, precision)
        yield from splits
    elif left.dtype == torch.bfloat16:
        source = weight_operands(sizes, left)
        read, splits = pieces_of(sizes, right, precision)
        yield from splits
    else:
        unit, times = "tf32", 1 if precision == 1 else 3
        source = weight_operands(sizes, left)
        read = (sizes.operand(right if isinstance(right, Tensor) else right.full),)
    others = [each for each in (*(update or ()), *results) if isinstance(each, Tensor)]
    factors = (*sizes.shape(left.shape), sizes.named(right.shape[-1]), Dim(2 * times))
    yield Event(part, f"{unit} × {times}", (*source, *read, *map(sizes.operand, others)), ((unit, factors),))


def pieces_of(sizes: Sizes, panel: Panel | Tensor, pieces: int) -> tuple[tuple[Operand, ...], list[Event]]:
    """The pieces of a panel that are read, and what splits its values if it has none."""
    given = panel if isinstance(panel, Panel) else Panel(panel, None)
    values = given.full if given.pieces is None else given.pieces
    splits = [split_event(sizes, values, pieces)] if given.pieces is None else []
    return (Operand((Dim(pieces), *sizes.operand(values).shape[-3:]), 2),), splits


def split(sizes: Sizes, results: Tensor, values: Tensor, pieces: int) -> Iterator[Event]:
    yield split_event(sizes, values, pieces)


def split_event(sizes: Sizes, values: Tensor, pieces: int) -> Event:
    operand = sizes.operand(values)
    written = Operand((Dim(pieces), *operand.shape), 2)
    return Event("products of panels", "split", (operand, written))


def inverse_cholesky(sizes: Sizes, results: tuple[Tensor, Tensor], gram: Tensor, shift: float) -> Iterator[Event]:
    """One kernel, in which each column waits for the one before, and each block column for its products."""
    batch, size, _ = sizes.shape(gram.shape)
    flops = (("fp32", (batch, size, size, size, Dim(CHOLESKY_FLOPS))),)
    operands = tuple(map(sizes.operand, (gram, *results)))
    yield Event("inverse_cholesky", "inverse_cholesky", operands, flops, steps=2 * gram.shape[-1])


def eigh(sizes: Sizes, results: tuple[Tensor, Tensor], matrices: Tensor) -> Iterator[Event]:
    """Two kernels for each round of a sweep (:mod:`pissa_kernels.ops.triton.jacobi`)."""
    batch, size, _ = sizes.shape(matrices.shape)
    flops = (("fp32", (batch, size, size, size, Dim(EIGH_FLOPS))),)
    rounds = 2 * -(-matrices.shape[-1] // jacobi.SMALL) - 1
    returning = 2 * rounds * (jacobi.SWEEPS - EIGH_SWEEPS)
    yield Event(
        "eigh",
        "eigh",
        tuple(map(sizes.operand, (matrices, *results))),
        flops,
        launches=2 * rounds * jacobi.SWEEPS,
        steps=rounds * EIGH_SWEEPS * ROUND_STEPS + returning,
    )


def sum_of_squares(sizes: Sizes, results: Tensor, weights: Weights) -> Iterator[Event]:
    """Two kernels: sums of blocks, and their sums."""
    yield Event("sum_of_squares", "sum_of_squares", weight_operands(sizes, weights), launches=2)


def subtract_lowrank_(
    sizes: Sizes, results: None, weights: Weights, lora_B: Tensor, lora_A: Tensor, scalings: Tensor
) -> Iterator[Event]:
    """One kernel, which reads and writes the weights; the factors are exact in bfloat16."""
    batch, rows, rank = sizes.shape(lora_B.shape)
    operands = (*weight_operands(sizes, weights), *weight_operands(sizes, weights))
    factors = (batch, rows, rank, sizes.named(lora_A.shape[-1]), Dim(2))
    yield Event(
        "subtract_lowrank_",
        "subtract_lowrank_",
        (*operands, sizes.operand(lora_B), sizes.operand(lora_A)),
        (("bf16", factors),),
    )


def weight_operands(sizes: Sizes, weights: Weights) -> tuple[Operand, ...]:
    """All weights of a batch."""
    first = weights.tensors[0]
    shape = sizes.shape((len(weights.tensors), *first.shape))
    return (Operand(shape, first.element_size()),)


COSTS: dict[str, Costs] = {
    "product": product,
    "split": split,
    "inverse_cholesky": inverse_cholesky,
    "eigh": eigh,
    "sum_of_squares": sum_of_squares,
    "subtract_lowrank_": subtract_lowrank_,
}
