"""Skinny products W·X and Wᵀ·Y: W is read once, as it is stored; the float32 panel meets it in bf16 pieces."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import multiprocessors, parameters
from .pieces import arithmetic, multiply


@triton.jit(do_not_specialize=["splits"])  # one compilation for every way to split
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
    """result (splits, batch, rows, cols): each program a tile of rows and columns, and its share of the inner sum."""
    down = tl.cdiv(rows, BLOCK_ROWS)
    across = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0)
    tile = program % (down * across)  # a weight's tiles are neighbours, and so are those that share its rows
    share = program // (down * across) % splits
    batch = (program // (down * across) // splits).to(tl.int64)
    batches = tl.num_programs(0) // (down * across * splits)
    row = (tile // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (tile % across).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    weight += batch * weight_batch
    panel += batch * panel_batch
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for first in range(share * BLOCK_INNER, inner, splits * BLOCK_INNER):
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
    result += (share * batches + batch) * rows * cols
    tl.store(result + row[:, None] * cols + col[None, :], total, mask=(row[:, None] < rows) & (col[None, :] < cols))


def splits(tiles: int, inner: int, block_inner: int, device: torch.device) -> int:
    """Programs that share one inner sum: a power of two, so that they fill the device some twice over.

    Each gets at least four blocks of the sum; the partial sums are added afterwards, in one order, because atomics
    would make two runs differ.
    """
    count = 1
    while count < 16 and tiles * count < 2 * multiprocessors(device) and inner >= 8 * count * block_inner:
        count *= 2
    return count


def matmul(weight: Tensor, X: Tensor, pieces: int = 3) -> Tensor:
    """W·X; see :func:`pissa_kernels.ops.matmul`."""
    *leading, rows, inner = weight.shape
    cols = X.shape[-1]
    stack, panels = (weight, X) if leading else (weight[None], X[None])
    if weight.numel() == 0 or cols == 0:
        return X.new_zeros(*leading, rows, cols)
    launch = parameters("product", weight.device, bytes=weight.element_size(), columns=cols)
    tiles = len(stack) * triton.cdiv(rows, launch["BLOCK_ROWS"]) * triton.cdiv(cols, launch["BLOCK_COLS"])
    shares = splits(tiles, inner, launch["BLOCK_INNER"], weight.device)
    partial = X.new_empty(shares, len(stack), rows, cols)
    with torch.cuda.device_of(weight):
        kernel[(tiles * shares,)](
            stack,
            panels,
            partial,
            rows,
            inner,
            cols,
            *stack.stride(),
            *panels.stride(),
            shares,
            PIECES=pieces,
            ARITHMETIC=arithmetic(weight.dtype),
            **launch,
        )
    total = partial[0] if shares == 1 else partial.sum(0)
    return total if leading else total[0]


def rmatmul(weight: Tensor, Y: Tensor, pieces: int = 3) -> Tensor:
    """Wᵀ·Y; see :func:`pissa_kernels.ops.rmatmul`."""
    return matmul(weight.mT, Y, pieces)


def normal(weight: Tensor, X: Tensor, pieces: int = 3) -> tuple[Tensor, Tensor]:
    """W·X and Wᵀ·W·X, with two reads of W; see :func:`pissa_kernels.ops.normal`."""
    Y = matmul(weight, X, pieces)
    return Y, rmatmul(weight, Y, pieces)
