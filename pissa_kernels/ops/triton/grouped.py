"""Many products in one launch: weights of one dtype and of any shapes, found through arrays of addresses.

A small model's weights do not fill a GPU one at a time, and a launch costs as much as the product of a small one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
from .pieces import multiply
from .product import half_precision

# Fields of a group's row in the table.
FIELDS = ("weight", "panel", "result", "rows", "inner", "weight_row", "weight_inner", "panel_inner", "panel_col")


@triton.jit
def kernel(
    table,
    tiles,
    cols,
    ELEMENT: tl.constexpr,
    INNER_CONTIGUOUS: tl.constexpr,
    ROW_CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECES: tl.constexpr,
    HALF_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A tile of rows of one group's result to a program; ``tiles`` says which: (group, first row) for each."""
    program = tl.program_id(0).to(tl.int64)
    group = table + tl.load(tiles + 2 * program) * 9
    first_row = tl.load(tiles + 2 * program + 1)
    weight = tl.load(group).to(tl.pointer_type(ELEMENT))
    panel = tl.load(group + 1).to(tl.pointer_type(tl.float32))
    result = tl.load(group + 2).to(tl.pointer_type(tl.float32))
    rows = tl.load(group + 3)
    inner = tl.load(group + 4)
    weight_row = tl.load(group + 5)
    weight_inner = tl.load(group + 6)
    panel_inner = tl.load(group + 7)
    panel_col = tl.load(group + 8)
    # what a launch would learn from its arguments
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        weight_row = tl.multiple_of(weight_row, 16)
        weight_inner = tl.multiple_of(weight_inner, 16)
        rows = tl.multiple_of(rows, 16)
        inner = tl.multiple_of(inner, 16)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for first in range(0, inner, BLOCK_INNER):
        index = first + tl.arange(0, BLOCK_INNER)
        along_row = row[:, None] if ROW_CONTIGUOUS else row[:, None] * weight_row
        along_inner = index[None, :] if INNER_CONTIGUOUS else index[None, :] * weight_inner
        W = tl.load(weight + along_row + along_inner, mask=(row[:, None] < rows) & (index[None, :] < inner), other=0.0)
        X = tl.load(
            panel + index[:, None] * panel_inner + col[None, :] * panel_col,
            mask=(index[:, None] < inner) & (col[None, :] < cols),
            other=0.0,
        )
        total = multiply(W, X, total, PIECES, HALF_PRECISION)
    tl.store(result + row[:, None] * cols + col[None, :], total, mask=(row[:, None] < rows) & (col[None, :] < cols))


ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def grouped(verb: str, weights: Sequence[Tensor], panels: Sequence[Tensor], pieces: int = 3) -> list[Tensor]:
    """``matmul`` or ``rmatmul`` of each weight with its panel; see :func:`pissa_kernels.ops.grouped_matmul`."""
    views = [weight if verb == "matmul" else weight.mT for weight in weights]
    cols = panels[0].shape[1]
    device = views[0].device
    results = [panel.new_empty(view.shape[0], cols) for view, panel in zip(views, panels, strict=True)]
    launch = parameters("grouped", device, bytes=views[0].element_size(), columns=cols)
    table, tiles = [], []
    for group, (view, panel, result) in enumerate(zip(views, panels, results, strict=True)):
        table.append((*(t.data_ptr() for t in (view, panel, result)), *view.shape, *view.stride(), *panel.stride()))
        tiles += [(group, first) for first in range(0, view.shape[0], launch["BLOCK_ROWS"])]
    if not tiles or cols == 0:
        return results
    # one copy to the device for both
    host = torch.tensor([*(field for row in table for field in row), *(part for tile in tiles for part in tile)])
    arrays = host.to(device)
    split = len(table) * len(FIELDS)
    strides = [view.stride() for view in views]
    numbers = [number for view in views for number in (view.data_ptr(), *view.shape, *view.stride()) if number != 1]
    with torch.cuda.device_of(views[0]):
        kernel[(len(tiles), triton.cdiv(cols, launch["BLOCK_COLS"]))](
            arrays[:split],
            arrays[split:],
            cols,
            ELEMENT=ELEMENTS[views[0].dtype],
            INNER_CONTIGUOUS=all(inner == 1 for _, inner in strides),
            ROW_CONTIGUOUS=all(row == 1 for row, _ in strides),
            ALIGNED=all(number % 16 == 0 for number in numbers),
            PIECES=pieces,
            HALF_PRECISION=half_precision(),
            **launch,
        )
    return results
