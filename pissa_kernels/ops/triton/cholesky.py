"""Shifted Cholesky factorizations of a batch of Gram matrices and the inverses of the factors, in one launch.

S = D^(−1/2)·G·D^(−1/2) + shift·I = L·Lᵀ with D = diag(G), and X = L^(−ᵀ). Both are computed a block column at a time,
by the same formula and with the same operands:

    L_ik = (S_ik − Σ_{j<k} L_ij·L_kjᵀ)·X_kk   for i > k
    X_ik = (0    − Σ_{j<k} X_ij·L_kjᵀ)·X_kk   for i < k

so that the result's memory holds L below the diagonal blocks and X on and above them, until the last step scales X to
C = D^(−1/2)·X and overwrites L with zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compilation import launch
from .launch import parameters


@triton.jit
def norms_of(squares):
    """Square roots; 0 of negative numbers and NaN of NaN."""
    return tl.where(squares <= 0.0, 0.0, tl.sqrt_rn(squares))


@triton.jit
def scales_of(squares):
    """Reciprocal square roots, 0 where a number is not positive."""
    positive = squares > 0.0
    return tl.where(positive, 1.0 / tl.sqrt_rn(tl.where(positive, squares, 1.0)), 0.0)


@triton.jit
def eliminate(M, index, BLOCK: tl.constexpr):
    """M = L·D·Lᵀ with unit lower triangular L: in place, D·Lᵀ on and above the diagonal and L⁻¹ below it.

    Gauss–Jordan elimination of what is below the diagonal, with a column of L⁻¹ in the place of each one eliminated.
    """
    row = index[:, None]
    col = index[None, :]
    for j in range(BLOCK):
        below = tl.sum(tl.where(col == j, M, 0.0), 1)
        right = tl.sum(tl.where(row == j, M, 0.0), 0)
        pivot = tl.sum(tl.where(index == j, right, 0.0), 0)
        multiplier = tl.where(index > j, below / pivot, 0.0)[:, None]
        M = tl.where((col == j) & (row > j), 0.0, M) - multiplier * tl.where(col == j, 1.0, right[None, :])
    return M


@triton.jit
def inverse_cholesky_kernel(gram, change, diagonal, size, shift, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """change (batch, size, size), diagonal (batch, size) of gram (batch, size, size): a matrix per program.

    ``size`` is a multiple of ``BLOCK``, the width of a block column, of which ``ROWS`` rows are computed at a time. A
    barrier stands between one thread's write and another's read of the same memory.
    """
    size = tl.multiple_of(size, BLOCK)
    batch = tl.program_id(0).to(tl.int64)
    gram += batch * size * size
    change += batch * size * size
    diagonal += batch * size
    index = tl.arange(0, BLOCK)
    equal = index[:, None] == index[None, :]
    failures = 0
    for k in range(size // BLOCK):
        col = k * BLOCK + index
        scale = scales_of(tl.load(gram + col * (size + 1)))
        for first in range(0, size, ROWS):
            row = first + tl.arange(0, ROWS)
            own = tl.where(row < size, row // BLOCK, -1)
            heights = scales_of(tl.load(gram + row * (size + 1), mask=own >= k, other=0.0))
            panel = row[:, None] * size + col[None, :]
            sums = tl.load(gram + panel, mask=(own >= k)[:, None], other=0.0) * heights[:, None] * scale[None, :]
            sums = tl.where(row[:, None] == col[None, :], 1.0 + shift, sums)
            for j in range(tl.where(first + ROWS > k * BLOCK, 0, first // BLOCK), k):
                inner = (j * BLOCK + index)[None, :]
                nonzero = (own >= k) | ((own >= 0) & (own <= j))  # X is zero below its diagonal, where L is
                left = tl.load(change + row[:, None] * size + inner, mask=nonzero[:, None], other=0.0)
                L = tl.load(change + col[:, None] * size + inner)
                sums -= tl.dot(left, tl.trans(L), input_precision="ieee")
            tl.store(change + panel, sums, mask=(own >= 0)[:, None])
        tl.debug_barrier()
        square = change + col[:, None] * size + col[None, :]
        block = eliminate(tl.load(square), index, BLOCK)
        pivots = tl.sum(tl.where(equal, block, 0.0), 1)
        failures += tl.sum(tl.where(pivots > 0.0, 0, 1), 0)  # NaN is not
        pivots = tl.sqrt_rn(pivots)
        tl.store(diagonal + col, pivots)
        inverse = tl.where(index[:, None] > index[None, :], block, tl.where(equal, 1.0, 0.0)) / pivots[:, None]
        tl.store(square, tl.trans(inverse))
        tl.debug_barrier()
        for first in range(0, size, ROWS):
            row = first + tl.arange(0, ROWS)
            place = change + row[:, None] * size + col[None, :]
            other = (row < size) & (row // BLOCK != k)
            sums = tl.load(place, mask=other[:, None], other=0.0)
            tl.store(place, tl.dot(sums, tl.load(square), input_precision="ieee"), mask=other[:, None])
        tl.debug_barrier()
    spoil = tl.where(failures > 0, float("nan"), 0.0)
    for first in range(0, size, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < size
        squares = tl.load(gram + row * (size + 1), mask=inside, other=0.0)
        for k in range(size // BLOCK):
            place = change + row[:, None] * size + (k * BLOCK + index)[None, :]
            upper = tl.load(place, mask=(inside & (row // BLOCK <= k))[:, None], other=0.0)
            tl.store(place, scales_of(squares)[:, None] * upper + spoil, mask=inside[:, None])
        roots = tl.load(diagonal + row, mask=inside, other=0.0)
        tl.store(diagonal + row, norms_of(squares) * roots + spoil, mask=inside)


def inverse_cholesky(gram: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """See :func:`pissa_kernels.ops.batched_reference.inverse_cholesky`."""
    batch, size, _ = gram.shape
    if gram.numel() == 0:
        return torch.empty_like(gram), gram.new_empty(batch, size)
    options = parameters("inverse_cholesky", gram.device, bytes=gram.element_size(), size=size)
    padding = -size % options["BLOCK"]
    padded = torch.nn.functional.pad(gram, (0, padding, 0, padding)).contiguous()  # with columns of zeros
    change = torch.empty_like(padded)
    diagonal = gram.new_empty(padded.shape[:2])
    with torch.cuda.device_of(gram):
        launch(inverse_cholesky_kernel, (batch,), padded, change, diagonal, padded.shape[1], shift, **options)
    return (change[:, :size, :size].contiguous(), diagonal[:, :size].contiguous()) if padding else (change, diagonal)
