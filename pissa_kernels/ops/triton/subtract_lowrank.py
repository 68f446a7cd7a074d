"""W −= s·B·A in place: one read and one write of W; the product B·A is never in memory.

The kernel must not be autotuned, because a trial run would subtract as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import as_stored
from .launch import parameters
from .pieces import arithmetic, multiply_floats


@triton.jit
def kernel(
    weight,
    left,
    right,
    scaling,
    rows,
    cols,
    rank,
    weight_row,
    weight_col,
    left_row,
    left_rank,
    right_rank,
    right_col,
    ARITHMETIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """weight (rows, cols) −= scaling·left (rows, rank)·right (rank, cols), one tile per program."""
    across = tl.cdiv(cols, BLOCK_COLS)
    tile = tl.program_id(0)
    row = (tile // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (tile % across).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside_rows = row[:, None] < rows
    inside_cols = col[None, :] < cols
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        index = first + tl.arange(0, BLOCK_RANK).to(tl.int64)
        B = tl.load(
            left + row[:, None] * left_row + index[None, :] * left_rank,
            mask=inside_rows & (index[None, :] < rank),
            other=0.0,
        )
        A = tl.load(
            right + index[:, None] * right_rank + col[None, :] * right_col,
            mask=inside_cols & (index[:, None] < rank),
            other=0.0,
        )
        # tensor cores accumulate with an error far below the rounding of a 16-bit weight, but not below that of a
        # float32 weight, for which the slower fused multiply-adds are used
        if weight.dtype.element_ty == tl.float32:
            total = tl.dot(B, A, total, input_precision="ieee")
        else:
            total = multiply_floats(B, A, total, ARITHMETIC)
    pointer = weight + row[:, None] * weight_row + col[None, :] * weight_col
    inside = inside_rows & inside_cols
    value = tl.load(pointer, mask=inside, other=0.0).to(tl.float32) - scaling * total
    tl.store(pointer, value.to(weight.dtype.element_ty), mask=inside)


def subtract_lowrank_(
    weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
) -> Tensor:
    """W −= s·B·A in place. See :func:`pissa_kernels.ops.subtract_lowrank_`."""
    view, left, right = as_stored(weight, lora_B, lora_A, fan_in_fan_out)
    rows, cols = view.shape
    rank = left.shape[1]
    if view.numel() == 0 or rank == 0:
        return weight
    launch = parameters("subtract_lowrank_", weight.device, bytes=weight.element_size(), rank=rank)
    tiles = triton.cdiv(rows, launch["BLOCK_ROWS"]) * triton.cdiv(cols, launch["BLOCK_COLS"])
    strides = (*view.stride(), *left.stride(), *right.stride())
    with torch.cuda.device_of(weight):
        # the pieces of both factors are bf16, whatever the weight's dtype
        kernel[(tiles,)](
            view, left, right, scaling, rows, cols, rank, *strides, ARITHMETIC=arithmetic(torch.bfloat16), **launch
        )
    torch.autograd.graph.increment_version(weight)
    return weight
