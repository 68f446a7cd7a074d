"""‖W‖_F² of each weight of a batch: one read of W, float32 sums of short runs, and float64 sums of those.

The sums are added in a fixed order, without atomics. The order depends on the shape, the strides and the alignment of
the weight itself, so that a weight has the same sum in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batched import Weights
from ..reference import is_column_major
from .compilation import launch
from .elements import ELEMENTS
from .launch import parameters

# Sums that a program of the second kernel adds at a time.
BLOCK_SUMS = 1024


@triton.jit
def sum_of_squares_kernel(
    weight,
    sums,
    rows,
    cols,
    weight_batch,
    weight_row,
    weight_col,
    ELEMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """sums (batch, blocks) float64 of the squares of blocks of rows, one block of one weight per program.

    ``weight`` is a batch of weights, or the table of their addresses.
    """
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    first = program % blocks * BLOCK_ROWS
    if weight.dtype.element_ty == tl.int64:
        address = tl.load(weight + batch)
    else:
        address = (weight + batch * weight_batch).to(tl.int64)
    # each weight's alignment is its own: the layout of the loads is also the order of the sum
    if address % 16 == 0:
        aligned = tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), 16)
        total = _squares(aligned, first, rows, cols, weight_row, weight_col, BLOCK_ROWS, BLOCK_COLS)
    else:
        unaligned = address.to(tl.pointer_type(ELEMENT))
        total = _squares(unaligned, first, rows, cols, weight_row, weight_col, BLOCK_ROWS, BLOCK_COLS)
    tl.store(sums + program, total)


@triton.jit
def _squares(weight, first, rows, cols, weight_row, weight_col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Sum of the squares of ``BLOCK_ROWS`` rows, in float64. A float32 sum has ⌈cols / BLOCK_COLS⌉ terms."""
    row, col = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    inside_rows = row[:, None] < (rows - first).to(tl.int32)
    weight += first * weight_row
    pointer = weight + (row.to(tl.int64)[:, None] * weight_row + col.to(tl.int64)[None, :] * weight_col)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, cols, BLOCK_COLS):
        W = tl.load(pointer, mask=inside_rows & (col[None, :] < cols - start), other=0.0).to(tl.float32)
        total += W * W
        pointer += tl.cast(BLOCK_COLS, tl.int64) * weight_col
    return tl.sum(total.to(tl.float64))


@triton.jit
def add_sums(sums, result, count, BLOCK: tl.constexpr):
    """result (batch,) = sums (batch, count) summed, one row per program."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, count, BLOCK):
        total += tl.load(sums + row * count + first + index, mask=index < count - first, other=0.0)
    tl.store(result + row, tl.sum(total))


def sum_of_squares(weights: Tensor) -> Tensor:
    """‖W‖_F² of each weight (batch, m, n). See :func:`pissa_kernels.ops.sum_of_squares`."""
    return _launch(weights, weights.mT if is_column_major(weights) else weights)


def sum_of_squares_batched(weights: Weights) -> Tensor:
    """‖W‖_F² of each weight. See :func:`pissa_kernels.ops.batched_reference.sum_of_squares`."""
    weight = weights.tensors[0]
    view = weight.mT if is_column_major(weight) else weight
    return _launch(weights.addresses, view.expand(len(weights.tensors), -1, -1))


def _launch(operand: Tensor, shape: Tensor) -> Tensor:
    """Sums for weights that have the shape, strides and dtype of ``shape`` (batch, rows, cols)."""
    batch, rows, cols = shape.shape
    result = torch.zeros(batch, dtype=torch.float64, device=shape.device)
    if shape.numel() == 0:
        return result
    options = parameters("sum_of_squares", shape.device, bytes=shape.element_size())
    blocks = triton.cdiv(rows, options["BLOCK_ROWS"])
    sums = result.new_empty(batch, blocks)
    with torch.cuda.device_of(shape):
        arguments = (operand, sums, rows, cols, *shape.stride())
        launch(sum_of_squares_kernel, (batch * blocks,), *arguments, ELEMENT=ELEMENTS[shape.dtype], **options)
        launch(add_sums, (batch,), sums, result, blocks, BLOCK=BLOCK_SUMS, num_warps=4)
    return result
