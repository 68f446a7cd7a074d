"""Products of a batch: weights by panels of few columns, and panels by panels.

bfloat16 weights are multiplied by bf16 pieces of the panel (:mod:`.pieces`), and the pieces of a panel by those of
another one. All go from global memory to the tensor cores by way of shared memory alone, which is what a pipeline of
asynchronous copies needs. Weights of other dtypes are multiplied in TF32: by one product, or by three of a split in two
("tf32x3"), which have the accuracy of float32.

Tensor cores truncate when they accumulate: over 4096 elements the error is 1.8e-5 and biased. So a product of more than
one piece starts a new accumulator for each ``BLOCK_INNER`` elements of the inner sum, and adds it to the total in
float32; a product of one piece is no more accurate than 2⁻⁹, and accumulates all the way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batched import Panel, Update, Weights
from ..reference import is_column_major
from .compilation import launch
from .elements import ELEMENTS
from .launch import parameters
from .pieces import arithmetic, exact
from .split import split

# Columns of the result that are stored at a time: all at once would take more registers than the main loop.
STORED = tl.constexpr(16)
# Columns of a tile, at most, where the inner dimension is masked: the masks take registers, too.
MASKED_COLUMNS = 128


def _name(specialization: Any) -> str:
    """Name of a compiled kernel, by which a profile tells weights from panels."""
    constants = specialization.constants
    if constants["LEFT_PIECES"]:
        return f"product_of_panels_{constants['PRECISION']}"
    return f"product_of_weights_{constants['PRECISION']}_{constants['ARITHMETIC']}"


@triton.jit(repr=_name)
def product_kernel(
    left,
    right,
    alpha,
    current,
    previous,
    values,
    pieces,
    beta,
    gamma,
    rows,
    inner,
    cols,
    left_piece,
    left_batch,
    left_row,
    left_inner,
    right_piece,
    right_batch,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    LEFT_PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_MORE: tl.constexpr,
):
    """values, pieces (batch, rows, cols) = alpha·left·right + beta·current + gamma·previous, one tile per program.

    A tile has ``BLOCK_COLS + BLOCK_MORE`` columns, so that 128 + 64 are possible, too. ``left`` are addresses of
    elements of type ``ELEMENT``, or pieces of panels if ``LEFT_PIECES``. The inner sum has ``WHOLE`` blocks, as it must
    with ``BLOCK_MORE``, or is masked.
    """
    tl.static_assert(BLOCK_MORE == 0 or (WHOLE and not LEFT_PIECES))
    across = tl.cdiv(cols, BLOCK_COLS + BLOCK_MORE)
    tiles = tl.cdiv(rows, BLOCK_ROWS) * across
    tile = tl.program_id(0) % tiles  # consecutive programs share a weight, and its rows, which stay in L2
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tile // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_col = tile % across * (BLOCK_COLS + BLOCK_MORE)
    index = tl.arange(0, BLOCK_INNER)

    if LEFT_PIECES:
        left += batch * left_batch
    else:
        left = tl.load(left + batch).to(tl.pointer_type(ELEMENT))
        if ALIGNED:  # a launch derives this hint from its arguments, but not from a table
            left = tl.multiple_of(left, 16)
    left += row[:, None] * left_row + index[None, :].to(tl.int64) * left_inner
    left_step = tl.cast(left_inner, tl.int64) * BLOCK_INNER
    right += batch * right_batch + first_col
    right_step = tl.cast(cols, tl.int64) * BLOCK_INNER
    col = tl.arange(0, BLOCK_COLS)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    if BLOCK_MORE:
        more_col = BLOCK_COLS + tl.arange(0, BLOCK_MORE)[None, :]
        more = tl.zeros((BLOCK_ROWS, BLOCK_MORE), dtype=tl.float32)

    for first in range(0, inner, BLOCK_INNER):
        inside = row[:, None] < rows
        if not WHOLE:
            inside &= index[None, :] < inner - first
        inside_right = first_col + col < cols
        if not WHOLE:
            inside_right &= index[:, None] < inner - first
        X = right + index[:, None] * cols + col
        if LEFT_PIECES:
            total = _multiply_pieces(
                left, inside, left_piece, X, inside_right, right_piece, total, PRECISION, ARITHMETIC
            )
        else:
            W = tl.load(left, mask=inside, other=0.0)
            total = _multiply(W, X, inside_right, right_piece, total, PRECISION, ARITHMETIC)
            if BLOCK_MORE:
                X = right + index[:, None] * cols + more_col
                more = _multiply(W, X, first_col + more_col < cols, right_piece, more, PRECISION, ARITHMETIC)
        left += left_step
        right += right_step

    size = (tl.num_programs(0) // tiles).to(tl.int64) * rows * cols
    terms = alpha, beta, current, gamma, previous
    _store(total, batch, row, first_col, rows, cols, size, terms, values, pieces, PIECES)
    if BLOCK_MORE:
        _store(more, batch, row, first_col + BLOCK_COLS, rows, cols, size, terms, values, pieces, PIECES)


@triton.jit
def _multiply(W, right, inside, right_piece, total, PRECISION: tl.constexpr, ARITHMETIC: tl.constexpr):
    """total + W·X, where ``right`` points to the largest piece of X, or to its float32 values."""
    if right.dtype.element_ty == tl.float32:
        A, X = W.to(tl.float32), tl.load(right, mask=inside, other=0.0)
        if ARITHMETIC == "tf32":
            X = _rounded(X)
            if W.dtype == tl.float32:
                A = _rounded(A)
        # "tf32x3" adds its three products to the total in float32
        total += tl.dot(A, X, input_precision=ARITHMETIC)
    elif PRECISION == 1:
        total = exact(W, tl.load(right, mask=inside, other=0.0), total, ARITHMETIC)
    else:
        part = tl.zeros(total.shape, dtype=tl.float32)
        for piece in tl.static_range(PRECISION - 1, -1, -1):  # smallest first
            part = exact(W, tl.load(right + piece * right_piece, mask=inside, other=0.0), part, ARITHMETIC)
        total += part
    return total


@triton.jit
def _multiply_pieces(
    left,
    inside_left,
    left_piece,
    right,
    inside_right,
    right_piece,
    total,
    PIECES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """total + Z·X of two panels, by the products of their pieces that are not below the last piece, smallest first."""
    part = tl.zeros(total.shape, dtype=tl.float32)
    for order in tl.static_range(PIECES - 1, -1, -1):
        for piece in tl.static_range(order + 1):
            Z = tl.load(left + piece * left_piece, mask=inside_left, other=0.0)
            X = tl.load(right + (order - piece) * right_piece, mask=inside_right, other=0.0)
            part = exact(Z, X, part, ARITHMETIC)
    return total + part


@triton.jit
def _rounded(X):
    """X rounded to TF32, which a tensor core would truncate."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [X], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _store(total, batch, row, first_col, rows, cols, size, terms, values, pieces, PIECES: tl.constexpr):
    """Add the terms of the update to columns of a tile and store them, ``STORED`` at a time."""
    width: tl.constexpr = total.shape[1]
    if width > STORED:
        low, high = tl.split(tl.permute(tl.reshape(total, (total.shape[0], 2, width // 2)), (0, 2, 1)))
        _store(low, batch, row, first_col, rows, cols, size, terms, values, pieces, PIECES)
        _store(high, batch, row, first_col + width // 2, rows, cols, size, terms, values, pieces, PIECES)
    else:
        alpha, beta, current, gamma, previous = terms
        col = first_col + tl.arange(0, width)
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        offset = (batch * rows + row[:, None]) * cols + col[None, :]
        if alpha is not None:
            total *= tl.load(alpha + batch)
        if current is not None:
            total += beta * tl.load(current + offset, mask=inside, other=0.0)
        if previous is not None:
            total += gamma * tl.load(previous + offset, mask=inside, other=0.0)
        if values is not None:
            tl.store(values + offset, total, mask=inside)
        for piece in tl.static_range(PIECES):
            rounded = total.to(tl.bfloat16)
            tl.store(pieces + piece * size + offset, rounded, mask=inside)
            total -= rounded.to(tl.float32)


def product(
    left: Weights | Panel | Tensor,
    right: Panel | Tensor,
    *,
    precision: int,
    update: Update | None = None,
    values: bool = True,
    pieces: int = 0,
) -> Panel:
    """left·right for each matrix of a batch. See :func:`pissa_kernels.ops.batched_reference.product`.

    A result does not depend on the other members of its batch.
    """
    batch, rows, inner = left.shape
    if isinstance(left, Weights):
        dtype, source, strides = left.dtype, left.addresses, (0, 0, *left.tensors[0].stride())
        aligned = all(weight.data_ptr() % 16 == 0 for weight in left.tensors)
        table = {"ELEMENT": ELEMENTS[dtype], "ALIGNED": aligned, "LEFT_PIECES": False}
    else:
        dtype, source = torch.bfloat16, _left_pieces(left, precision)
        strides = source.stride()
        table = {"ELEMENT": None, "ALIGNED": False, "LEFT_PIECES": True}
    panel = _pieces(right, precision) if dtype == torch.bfloat16 else _values(right)
    cols = panel.shape[-1]
    found = source.new_empty(batch, rows, cols, dtype=torch.float32) if values else None
    found_pieces = source.new_empty(pieces, batch, rows, cols, dtype=torch.bfloat16) if pieces else None
    verb = "product" if isinstance(left, Weights) else "product_of_panels"
    options = _parameters(verb, source.device, panel.element_size(), inner, cols, precision)
    across = triton.cdiv(cols, options["BLOCK_COLS"] + options["BLOCK_MORE"])
    programs = batch * triton.cdiv(rows, options["BLOCK_ROWS"]) * across
    if programs:
        alpha, beta, current, gamma, previous = update or (None, 0.0, None, 0.0, None)
        arguments = (source, panel, alpha, current, previous, found, found_pieces, beta, gamma, rows, inner, cols)
        with torch.cuda.device_of(source):
            launch(
                product_kernel,
                (programs,),
                *arguments,
                *strides,
                *panel.stride()[:2],
                WHOLE=inner % options["BLOCK_INNER"] == 0,
                PRECISION=len(panel),
                PIECES=pieces,
                ARITHMETIC=arithmetic(dtype, precision),
                **table,
                **options,
            )
    return Panel(found, found_pieces)


def _parameters(verb: str, device: torch.device, size: int, inner: int, cols: int, precision: int) -> dict[str, int]:
    """Launch parameters for the bytes of an element of the panel, the dimensions and the precision."""
    options = parameters(verb, device, bytes=size, columns=max(cols, 1), pieces=precision)
    if inner % options["BLOCK_INNER"] and cols > MASKED_COLUMNS:
        return parameters(verb, device, bytes=size, columns=MASKED_COLUMNS, pieces=precision)
    return options


def _pieces(panel: Panel | Tensor, precision: int) -> Tensor:
    """The pieces that are multiplied: (precision, batch, rows, cols) bfloat16."""
    if isinstance(panel, Tensor):
        return split(panel, precision)
    return split(panel.full, precision) if panel.pieces is None else panel.pieces[:precision]


def _left_pieces(panel: Panel | Tensor, precision: int) -> Tensor:
    """:func:`_pieces` of the left side, of which a transposed view stays one."""
    view = panel if isinstance(panel, Tensor) else panel.pieces if panel.values is None else panel.values
    assert view is not None
    return _pieces(panel.mT, precision).mT if is_column_major(view) else _pieces(panel, precision)


def _values(panel: Panel | Tensor) -> Tensor:
    """The float32 values, as one "piece": (1, batch, rows, cols)."""
    return (panel.full if isinstance(panel, Panel) else panel).contiguous()[None]
