"""Eigenvalues and eigenvectors of a batch of symmetric matrices by the block Jacobi method.

A sweep pairs every two blocks of rows and columns once, in rounds of disjoint pairs. A round has two launches:
``diagonalize`` finds for each pair the rotations Q that bring its subproblem closer to a diagonal, and ``update``
applies them, A ← Qᵀ·A·Q and V ← V·Q, in place. A matrix that fits into one subproblem takes one launch.

A sweep in which no rotation of a matrix was needed ends its work: the launches that remain return at once, and the host
decides nothing. A rotation is needed where |a_ij| > √n·u·√(a_ii·a_jj), as in LAPACK's xGESVJ: the eigenvalues of a
positive definite matrix then have a small relative error, however graded it is (Demmel & Veselić 1992).
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compilation import Repeated, launch
from .launch import parameters
from .subproblem import diagonalize, members

UNIT_ROUNDOFF = 2.0**-24
# Random matrices of 64 to 512 rows take 6 to 10 sweeps, nearly diagonal ones 3 or 4, the last without a rotation. Two
# clusters of 224 eigenvalues leave a residual of 10·n·u after 10 sweeps and of 0.4·n·u after 12. Dense matrices with a
# condition number beyond 1/u leave 0.2·n·u by then, but no end of rotations between eigenvalues that are round-off.
SWEEPS = 12
# Rows of a subproblem. One of 64 rows costs twice as much per element, but a matrix that it holds takes one launch.
SMALL, LARGE = 32, 64


@triton.jit(do_not_specialize=["batch", "pairs", "sweep", "step"])
def update(
    matrices,
    vectors,
    turns,
    busy,
    unfinished,
    batch,
    pairs,
    sweep,
    step,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A ← Qᵀ·A·Q and V ← V·Q in place, but for the diagonal blocks of A, which ``diagonalize`` has written.

    A program computes ``ROWS`` rows of V for one pair, or the elements of A between two pairs and their mirror images.
    """
    tile = tl.program_id(0)
    pair = tl.program_id(1)
    matrix = tl.program_id(2)
    if tl.load(unfinished + sweep * batch + matrix) != 0:
        n = pairs * SIZE
        start = matrix.to(tl.int64) * n * n
        index = tl.arange(0, SIZE)
        square = index[:, None] * SIZE + index[None, :]
        here = matrix * pairs + pair
        moved = tl.load(busy + here) != 0
        col = members(step, pair, pairs, SIZE)
        tiles = tl.cdiv(n, ROWS)
        if tile < tiles:
            if moved:
                row = tile * ROWS + tl.arange(0, ROWS)
                place = vectors + start + row[:, None] * n + col[None, :]
                V = tl.load(place, mask=row[:, None] < n, other=0.0)
                Q = tl.trans(tl.load(turns + here.to(tl.int64) * SIZE * SIZE + square))
                tl.store(place, tl.dot(V, Q, input_precision="ieee"), mask=row[:, None] < n)
        else:
            there = matrix * pairs + tile - tiles
            moved_there = tl.load(busy + there) != 0
            if (tile - tiles < pair) & (moved | moved_there):
                row = members(step, tile - tiles, pairs, SIZE)
                place = matrices + start + row[:, None] * n + col[None, :]
                A = tl.load(place)
                if moved:
                    Q = tl.trans(tl.load(turns + here.to(tl.int64) * SIZE * SIZE + square))
                    A = tl.dot(A, Q, input_precision="ieee")
                if moved_there:
                    Qt = tl.load(turns + there.to(tl.int64) * SIZE * SIZE + square)
                    A = tl.dot(Qt, A, input_precision="ieee")
                tl.store(place, A)
                tl.store(matrices + start + col[:, None] * n + row[None, :], tl.trans(A))


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pissa_kernels.ops.batched_reference.eigh`."""
    rows = LARGE if SMALL < matrices.shape[-1] <= LARGE else SMALL
    return block_jacobi(matrices, rows)


def block_jacobi(matrices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """:func:`eigh` with subproblems of ``rows`` rows, a power of two."""
    batch, size, _ = matrices.shape
    if matrices.numel() == 0:
        return matrices.new_empty(batch, size), torch.empty_like(matrices)
    device = matrices.device
    finite = torch.isfinite(matrices).all(-1).all(-1)
    clean = torch.where(finite[:, None, None], matrices, 0.0)
    # a power of two brings the largest element near 1, so that no square overflows
    exponent = torch.frexp(clean.abs().amax((-2, -1))).exponent.clamp(-126, 126)[:, None, None]
    scaled = torch.ldexp(clean, -exponent)
    pairs = triton.cdiv(size, rows)
    work = matrices.new_zeros(batch, pairs * rows, pairs * rows)
    work[:, :size, :size] = 0.5 * (scaled + scaled.mT)
    turns = matrices.new_empty(batch, pairs, rows, rows)
    busy = torch.zeros(batch, pairs, dtype=torch.int32, device=device)
    unfinished = torch.zeros(SWEEPS + 1, batch, dtype=torch.int32, device=device)
    unfinished[0].fill_(1)
    vectors = torch.eye(pairs * rows, device=device).repeat(batch, 1, 1)
    norms = work.abs().amax((-2, -1))
    tolerance = math.sqrt(size) * UNIT_ROUNDOFF
    with torch.cuda.device_of(matrices):
        if pairs == 1:
            options = parameters("eigh.diagonalize", device, bytes=4, rows=rows, sweeps=SWEEPS)
            one = (work, turns, busy, unfinished, norms, batch, 1, 0, 0, tolerance)
            launch(diagonalize, (batch,), *one, SIZE=rows, LIMIT=SWEEPS, **options)
            vectors = torch.where(busy[:, :, None] != 0, turns[:, 0].mT, vectors)
        else:
            first = parameters("eigh.diagonalize", device, bytes=4, rows=rows, sweeps=1)
            second = parameters("eigh.update", device, bytes=4, rows=rows)
            tile = second["ROWS"]
            second = {name: value for name, value in second.items() if name != "ROWS"}
            grid = (triton.cdiv(pairs * rows, tile) + pairs, pairs, batch)
            solve = Repeated(diagonalize, (batch * pairs,), {"SIZE": rows, "LIMIT": 1}, first)
            rotate = Repeated(update, grid, {"SIZE": rows, "ROWS": tile}, second)
            for sweep, step in itertools.product(range(SWEEPS), range(2 * pairs - 1)):
                solve(work, turns, busy, unfinished, norms, batch, pairs, sweep, step, tolerance)
                rotate(work, vectors, turns, busy, unfinished, batch, pairs, sweep, step)
    values = torch.ldexp(work.diagonal(dim1=-2, dim2=-1)[:, :size], exponent[..., 0])
    values, order = values.sort(descending=True, stable=True)
    vectors = vectors[:, :size, :size].gather(2, order[:, None, :].expand(-1, size, -1))
    values = torch.where(finite[:, None], values, torch.nan)
    return values, torch.where(finite[:, None, None], vectors, torch.nan)
