"""What each operation of :mod:`pissa_kernels.ops.batched` costs as a kernel: operands, operations, launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pissa_kernels.ops.batched import Panel, Update, Weights
from pissa_kernels.ops.triton import jacobi

from .events import Dim, Event, Operand

if TYPE_CHECKING:
    from .recorder import Recording

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
    record: Recording,
    results: Panel,
    left: Weights | Tensor,
    right: Panel | Tensor,
    *,
    precision: int,
    update: Update | None = None,
    **_: Any,
) -> Iterator[Event]:
    """One kernel. bfloat16 weights are multiplied by pieces, other matrices once or three times in TF32."""
    given = right if isinstance(right, Panel) else Panel(right, None)
    if isinstance(left, Weights):
        part, source = "products with weights", weight_operands(record, left)
    else:
        part, source = "products of panels", (record.operand(left),)
    if left.dtype == torch.bfloat16:
        unit, times = "bf16", precision
        if given.pieces is None:
            assert given.values is not None
            yield split_event(record, given.values, precision)
        panel = given.values if given.pieces is None else given.pieces
        assert panel is not None
        read: tuple[Operand, ...] = (Operand((Dim(precision), *record.operand(panel).shape[-3:]), 2),)
    else:
        unit, times = "tf32", 1 if precision == 1 else 3
        assert given.values is not None
        panel, read = given.values, (record.operand(given.values),)
    others = [each for each in (*(update or ()), *results) if isinstance(each, Tensor)]
    factors = (*record.sizes.shape(left.shape), record.sizes.named(panel.shape[-1]), Dim(2 * times))
    yield Event(part, f"{unit} × {times}", (*source, *read, *map(record.operand, others)), ((unit, factors),))


def split(record: Recording, results: Tensor, values: Tensor, pieces: int) -> Iterator[Event]:
    yield split_event(record, values, pieces)


def split_event(record: Recording, values: Tensor, pieces: int) -> Event:
    operand = record.operand(values)
    written = Operand((Dim(pieces), *operand.shape), 2)
    return Event("products of panels", "split", (operand, written))


def inverse_cholesky(record: Recording, results: tuple[Tensor, Tensor], gram: Tensor, shift: float) -> Iterator[Event]:
    """One kernel, in which each column waits for the one before, and each block column for its products."""
    batch, size, _ = record.shape(gram)
    flops = (("fp32", (batch, size, size, size, Dim(CHOLESKY_FLOPS))),)
    operands = tuple(map(record.operand, (gram, *results)))
    yield Event("inverse_cholesky", "inverse_cholesky", operands, flops, steps=2 * gram.shape[-1])


def eigh(record: Recording, results: tuple[Tensor, Tensor], matrices: Tensor) -> Iterator[Event]:
    """Two kernels for each round of a sweep (:mod:`pissa_kernels.ops.triton.jacobi`)."""
    batch, size, _ = record.shape(matrices)
    flops = (("fp32", (batch, size, size, size, Dim(EIGH_FLOPS))),)
    rounds = 2 * -(-matrices.shape[-1] // jacobi.SMALL) - 1
    returning = 2 * rounds * (jacobi.SWEEPS - EIGH_SWEEPS)
    yield Event(
        "eigh",
        "eigh",
        tuple(map(record.operand, (matrices, *results))),
        flops,
        launches=2 * rounds * jacobi.SWEEPS,
        steps=rounds * EIGH_SWEEPS * ROUND_STEPS + returning,
    )


def sum_of_squares(record: Recording, results: Tensor, weights: Weights) -> Iterator[Event]:
    """Two kernels: sums of blocks, and their sums."""
    yield Event("sum_of_squares", "sum_of_squares", weight_operands(record, weights), launches=2)


def subtract_lowrank_(
    record: Recording, results: None, weights: Weights, lora_B: Tensor, lora_A: Tensor, scalings: Tensor
) -> Iterator[Event]:
    """One kernel, which reads and writes the weights; the factors are exact in bfloat16."""
    batch, rows, rank = record.shape(lora_B)
    operands = (*weight_operands(record, weights), *weight_operands(record, weights))
    factors = (batch, rows, rank, record.sizes.named(lora_A.shape[-1]), Dim(2))
    yield Event(
        "subtract_lowrank_",
        "subtract_lowrank_",
        (*operands, record.operand(lora_B), record.operand(lora_A)),
        (("bf16", factors),),
    )


def weight_operands(record: Recording, weights: Weights) -> tuple[Operand, ...]:
    """All weights of a batch."""
    first = weights.tensors[0]
    shape = record.sizes.shape((len(weights.tensors), *first.shape))
    return (Operand(shape, first.element_size()),)


COSTS: dict[str, Costs] = {
    "product": product,
    "split": split,
    "inverse_cholesky": inverse_cholesky,
    "eigh": eigh,
    "sum_of_squares": sum_of_squares,
    "subtract_lowrank_": subtract_lowrank_,
}
