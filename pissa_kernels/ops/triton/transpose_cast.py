"""Wᵀ in another dtype: one read of W and one write of the result, both coalesced."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import is_column_major
from .compilation import launch
from .launch import parameters


@triton.jit
def transpose_cast_kernel(
    source,
    result,
    rows,
    cols,
    row_stride,
    col_stride,
    COLUMN_MAJOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """result (cols, rows) = source (rows, cols)ᵀ, one tile per program."""
    across = tl.cdiv(cols, BLOCK_COLS)
    tile = tl.program_id(0)
    # 64-bit offsets, because they exceed 2³¹ in a weight with more elements or with large strides
    row = (tile // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (tile % across).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = (col[:, None] < cols) & (row[None, :] < rows)
    if COLUMN_MAJOR:  # the elements are in the order of the result
        transposed = tl.load(source + col[:, None] * col_stride + row[None, :] * row_stride, mask=inside, other=0.0)
    else:
        mask = (row[:, None] < rows) & (col[None, :] < cols)
        block = tl.load(source + row[:, None] * row_stride + col[None, :] * col_stride, mask=mask, other=0.0)
        transposed = tl.trans(block)
    # by way of float32, so that fp16 to bf16 is rounded in every version of Triton
    value = transposed.to(tl.float32).to(result.dtype.element_ty)
    tl.store(result + col[:, None] * rows + row[None, :], value, mask=inside)


def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ in ``dtype``. See :func:`pissa_kernels.ops.transpose_cast`."""
    m, n = weight.shape
    result = weight.new_empty(n, m, dtype=dtype)
    if result.numel() == 0:
        return result
    options = parameters("transpose_cast", weight.device, bytes=weight.element_size() + result.element_size())
    tiles = triton.cdiv(m, options["BLOCK_ROWS"]) * triton.cdiv(n, options["BLOCK_COLS"])
    with torch.cuda.device_of(weight):
        launch(
            transpose_cast_kernel,
            (tiles,),
            weight,
            result,
            m,
            n,
            *weight.stride(),
            COLUMN_MAJOR=is_column_major(weight),
            **options,
        )
    return result
