"""W −= s·B·A in place, for one weight or a batch: one read and one write of W; the product B·A is never in memory.

The products of 16-bit numbers are exact in float32, so 16-bit factors are multiplied as they are, once. float32 factors
are split into three bf16 pieces each, of which six products are summed.

The kernel must not be autotuned, because a trial run would subtract as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batched import Weights
from ..reference import as_stored, is_column_major
from .compilation import launch
from .elements import ELEMENTS
from .launch import parameters
from .pieces import arithmetic, multiply_floats


@triton.jit
def subtract_lowrank_kernel(
    weight,
    left,
    right,
    scaling,
    rows,
    cols,
    rank,
    weight_row,
    weight_col,
    left_batch,
    left_row,
    left_rank,
    right_batch,
    right_rank,
    right_col,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EQUAL: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """weight (rows, cols) −= scaling·left (rows, rank)·right (rank, cols), one tile of one weight per program.

    ``weight`` is a weight, or the table of the addresses of a batch; ``scaling`` a number if ``EQUAL``, else one for
    each weight.
    """
    across = tl.cdiv(cols, BLOCK_COLS)
    tiles = tl.cdiv(rows, BLOCK_ROWS) * across
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    top = (tile // across).to(tl.int64) * BLOCK_ROWS
    start = (tile % across).to(tl.int64) * BLOCK_COLS
    # within the tile: 64-bit for offsets, which strides may make large, and 32-bit for masks, to save registers
    row, col, index = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS), tl.arange(0, BLOCK_RANK)
    i, j, k = row.to(tl.int64), col.to(tl.int64), index.to(tl.int64)
    inside_rows = row[:, None] < (rows - top).to(tl.int32)
    inside_cols = col[None, :] < (cols - start).to(tl.int32)
    if weight.dtype.element_ty == tl.int64:
        weight = tl.load(weight + batch).to(tl.pointer_type(ELEMENT))
        if ALIGNED:  # a hint that a launch derives from its arguments, but not from a table
            weight = tl.multiple_of(weight, 16)
    weight += top * weight_row + start * weight_col
    pointer = weight + (i[:, None] * weight_row + j[None, :] * weight_col)
    W = tl.load(pointer, mask=inside_rows & inside_cols, other=0.0)  # before the product, which hides the latency
    left += batch * left_batch + top * left_row
    right += batch * right_batch + start * right_col
    left_pointer = left + (i[:, None] * left_row + k[None, :] * left_rank)
    right_pointer = right + (k[:, None] * right_rank + j[None, :] * right_col)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        B = tl.load(left_pointer, mask=inside_rows & (index[None, :] < rank - first), other=0.0)
        A = tl.load(right_pointer, mask=inside_cols & (index[:, None] < rank - first), other=0.0)
        # tensor cores accumulate with an error far below the rounding of a 16-bit weight, but not below that of a
        # float32 weight, for which the slower fused multiply-adds are used
        if W.dtype == tl.float32:
            total = tl.dot(B, A, total, input_precision="ieee")
        elif B.dtype == tl.float32:
            total = multiply_floats(B, A, total, ARITHMETIC)
        elif ARITHMETIC == "ieee":
            total = tl.dot(B.to(tl.float32), A.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(B, A, total)
        left_pointer += tl.cast(BLOCK_RANK, tl.int64) * left_rank
        right_pointer += tl.cast(BLOCK_RANK, tl.int64) * right_rank
    if not EQUAL:
        scaling = tl.load(scaling + batch)
    # Triton brings W to the layout of the sums and takes the rounded difference back, rather than the float32 sums
    tl.store(pointer, (W.to(tl.float32) - scaling * total).to(ELEMENT), mask=inside_rows & inside_cols)


def subtract_lowrank_(
    weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
) -> Tensor:
    """W −= s·B·A in place. See :func:`pissa_kernels.ops.subtract_lowrank_`."""
    view, left, right = as_stored(weight, lora_B, lora_A, fan_in_fan_out)
    _launch([view], view, left[None], right[None], scaling)
    return weight


def subtract_lowrank_batched_(weights: Weights, lora_B: Tensor, lora_A: Tensor, scalings: Tensor) -> None:
    """W −= s·B·A in place, for each weight. See :func:`pissa_kernels.ops.batched_reference.subtract_lowrank_`."""
    if is_column_major(weights.tensors[0]):
        weights, lora_B, lora_A = weights.mT, lora_A.mT, lora_B.mT
    numbers = scalings.tolist()
    scaling: float | Tensor = numbers[0]
    if numbers.count(scaling) < len(numbers):
        table = scalings.float()
        table = table.pin_memory() if weights.device.type == "cuda" else table
        scaling = table.to(weights.device, non_blocking=True)
    _launch(weights.tensors, weights.addresses, lora_B, lora_A, scaling)


def _launch(weights: Sequence[Tensor], operand: Tensor, left: Tensor, right: Tensor, scaling: float | Tensor) -> None:
    """Subtract from weights (rows, cols) of equal strides. ``operand`` is the only weight, or a table of addresses."""
    weight = weights[0]
    rows, cols = weight.shape
    rank = right.shape[1]
    if weight.numel() == 0 or rank == 0:
        return
    if weight.dtype == torch.float32:
        left, right = left.float(), right.float()
    size = weight.element_size() + left.element_size()
    options = parameters("subtract_lowrank_", weight.device, bytes=size, rank=rank)
    tiles = triton.cdiv(rows, options["BLOCK_ROWS"]) * triton.cdiv(cols, options["BLOCK_COLS"])
    with torch.cuda.device_of(weight):
        launch(
            subtract_lowrank_kernel,
            (len(weights) * tiles,),
            operand,
            left,
            right,
            scaling,
            rows,
            cols,
            rank,
            *weight.stride(),
            *left.stride(),
            *right.stride(),
            ELEMENT=ELEMENTS[weight.dtype],
            ALIGNED=all(each.data_ptr() % 16 == 0 for each in weights),
            EQUAL=not isinstance(scaling, Tensor),
            # the pieces of both factors are bf16, whatever the weight's dtype
            ARITHMETIC=arithmetic(torch.bfloat16),
            **options,
        )
    torch.autograd.graph.increment_version(weights)
