"""Skinny products W·X and Wᵀ·Y. W is read once, in its own dtype; the float32 panel is split into bf16 pieces."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import multiprocessors, parameters
from .pieces import arithmetic, multiply


@triton.jit(do_not_specialize=["splits"])  # one compilation for any number of splits
def kernel(
    weight,
    panel,
    result,
    rows,
    inner,
    cols,
    weight_batch,
    weight_row,
    weight_inner,
    panel_batch,
    panel_inner,
    panel_col,
    splits,
    PIECES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """result (splits, batch, rows, cols). A program computes one split of the inner sum for a tile of the result."""
    down = tl.cdiv(rows, BLOCK_ROWS)
    across = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0)
    tile = program % (down * across)  # consecutive programs share a weight, and its rows, which stay in L2
    split = program // (down * across) % splits
    batch = (program // (down * across) // splits).to(tl.int64)
    batches = tl.num_programs(0) // (down * across * splits)
    row = (tile // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (tile % across).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    weight += batch * weight_batch
    panel += batch * panel_batch
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for first in range(split * BLOCK_INNER, inner, splits * BLOCK_INNER):
        index = first + tl.arange(0, BLOCK_INNER).to(tl.int64)
        W = tl.load(
            weight + row[:, None] * weight_row + index[None, :] * weight_inner,
            mask=(row[:, None] < rows) & (index[None, :] < inner),
            other=0.0,
        )
        X = tl.load(
            panel + index[:, None] * panel_inner + col[None, :] * panel_col,
            mask=(index[:, None] < inner) & (col[None, :] < cols),
            other=0.0,
        )
        total = multiply(W, X, total, PIECES, ARITHMETIC)
    result += (split * batches + batch) * rows * cols
    tl.store(result + row[:, None] * cols + col[None, :], total, mask=(row[:, None] < rows) & (col[None, :] < cols))


def splits(tiles: int, inner: int, block_inner: int, device: torch.device) -> int:
    """Number of programs that share an inner sum: a power of two, for about two programs per multiprocessor.

    A program has at least four blocks of the sum. The partial sums are added afterwards in a fixed order, because with
    atomics two runs would differ.
    """
    count = 1
    while count < 16 and tiles * count < 2 * multiprocessors(device) and inner >= 8 * count * block_inner:
        count *= 2
    return count


def matmul(weight: Tensor, X: Tensor, pieces: int = 3) -> Tensor:
    """W·X. See :func:`pissa_kernels.ops.matmul`."""
    *leading, rows, inner = weight.shape
    cols = X.shape[-1]
    weights, panels = (weight, X) if leading else (weight[None], X[None])
    if weight.numel() == 0 or cols == 0:
        return X.new_zeros(*leading, rows, cols)
    launch = parameters("product", weight.device, bytes=weight.element_size(), columns=cols)
    tiles = len(weights) * triton.cdiv(rows, launch["BLOCK_ROWS"]) * triton.cdiv(cols, launch["BLOCK_COLS"])
    count = splits(tiles, inner, launch["BLOCK_INNER"], weight.device)
    partial = X.new_empty(count, len(weights), rows, cols)
    with torch.cuda.device_of(weight):
        kernel[(tiles * count,)](
            weights,
            panels,
            partial,
            rows,
            inner,
            cols,
            *weights.stride(),
            *panels.stride(),
            count,
            PIECES=pieces,
            ARITHMETIC=arithmetic(weight.dtype),
            **launch,
        )
    total = partial[0] if count == 1 else partial.sum(0)
    return total if leading else total[0]


def rmatmul(weight: Tensor, Y: Tensor, pieces: int = 3) -> Tensor:
    """Wᵀ·Y. See :func:`pissa_kernels.ops.rmatmul`."""
    return matmul(weight.mT, Y, pieces)


def normal(weight: Tensor, X: Tensor, pieces: int = 3) -> tuple[Tensor, Tensor]:
    """W·X and Wᵀ·W·X, with two reads of W. See :func:`pissa_kernels.ops.normal`."""
    Y = matmul(weight, X, pieces)
    return Y, rmatmul(weight, Y, pieces)
