"""Products of many weights in one launch. The weights have one dtype and any shapes.

The weights of a small model do not fill a GPU one at a time, and a launch takes as long as the product of a small one.
The kernel finds its operands through a table of addresses, shapes and strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .launch import parameters
from .pieces import arithmetic, multiply

# Columns of the table, which has a row per weight.
FIELDS = ("weight", "panel", "result", "rows", "inner", "weight_row", "weight_inner", "panel_inner", "panel_col")


@triton.jit
def kernel(
    table,
    tiles,
    cols,
    ELEMENT: tl.constexpr,
    INNER_CONTIGUOUS: tl.constexpr,
    ROW_CONTIGUOUS: tl.constexpr,
    PANEL_CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program computes a tile of rows of one result; ``tiles`` holds the pair (group, tile) of each program."""
    program = tl.program_id(0).to(tl.int64)
    group = table + tl.load(tiles + 2 * program) * 9  # len(FIELDS)
    first_row = tl.load(tiles + 2 * program + 1) * BLOCK_ROWS
    weight = tl.load(group).to(tl.pointer_type(ELEMENT))
    panel = tl.load(group + 1).to(tl.pointer_type(tl.float32))
    result = tl.load(group + 2).to(tl.pointer_type(tl.float32))
    rows = tl.load(group + 3)
    inner = tl.load(group + 4).to(tl.int32)
    weight_row = tl.load(group + 5)
    weight_inner = tl.load(group + 6)
    panel_inner = tl.load(group + 7)
    panel_col = tl.load(group + 8)
    result = tl.multiple_of(result, 16)  # as torch allocates it
    if ALIGNED:  # hints that a launch derives from its arguments, but not from a table
        weight = tl.multiple_of(weight, 16)
        panel = tl.multiple_of(panel, 16)
        weight_row = tl.multiple_of(weight_row, 16)
        weight_inner = tl.multiple_of(weight_inner, 16)
        panel_inner = tl.multiple_of(panel_inner, 16)
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
            panel + index[:, None] * panel_inner + (col[None, :] if PANEL_CONTIGUOUS else col[None, :] * panel_col),
            mask=(index[:, None] < inner) & (col[None, :] < cols),
            other=0.0,
        )
        total = multiply(W, X, total, PIECES, ARITHMETIC)
    tl.store(result + row[:, None] * cols + col[None, :], total, mask=(row[:, None] < rows) & (col[None, :] < cols))


ELEMENTS_BY_NAME = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def grouped(verb: str, weights: Sequence[Tensor], panels: Sequence[Tensor], pieces: int = 3) -> list[Tensor]:
    """W·X or Wᵀ·Y for each weight and its panel, in one launch.

    Args:
        verb: "matmul" or "rmatmul".
        weights: (m, n) each, of one dtype and on one device; float32, float16 or bfloat16, any strides.
        panels: for each weight (n, k) float32, (m, k) for "rmatmul", with one k for all.
        pieces: as for :func:`pissa_kernels.ops.matmul`.

    Returns:
        For each weight (m, k) float32, (n, k) for "rmatmul".

    Raises:
        TypeError: another dtype.
        ValueError: shapes, dtypes or devices that do not match.
    """
    checks.check_pieces(f"grouped {verb}", pieces)
    checks.check_group(f"grouped {verb}", weights, panels, axis=-1 if verb == "matmul" else -2)
    if not weights:
        return []
    views = [weight if verb == "matmul" else weight.mT for weight in weights]
    dtype, device, cols = views[0].dtype, views[0].device, panels[0].shape[1]
    results = [panel.new_empty(view.shape[0], cols) for view, panel in zip(views, panels, strict=True)]
    launch = parameters("grouped", device, bytes=dtype.itemsize, columns=cols)
    table = [
        (*(tensor.data_ptr() for tensor in (view, panel, result)), *view.shape, *view.stride(), *panel.stride())
        for view, panel, result in zip(views, panels, results, strict=True)
    ]
    tiles = [
        (group, tile)
        for group, view in enumerate(views)
        for tile in range(triton.cdiv(view.shape[0], launch["BLOCK_ROWS"]))
    ]
    if not tiles or cols == 0:
        return results
    # one copy to the device for both lists
    host = torch.tensor([*(field for row in table for field in row), *(part for tile in tiles for part in tile)])
    arrays = host.to(device)
    split = len(table) * len(FIELDS)
    with torch.cuda.device_of(views[0]):
        kernel[(len(tiles), triton.cdiv(cols, launch["BLOCK_COLS"]))](
            arrays[:split],
            arrays[split:],
            cols,
            ELEMENT=ELEMENTS[dtype],
            PIECES=pieces,
            ARITHMETIC=arithmetic(dtype),
            **_hints(table),
            **launch,
        )
    return results


def _hints(table: list[tuple[int, ...]]) -> dict[str, bool]:
    """The kernel's constants that describe the operands: each holds for all groups, or is False."""
    *numbers, weight_row, weight_inner, panel_inner, panel_col = zip(*table, strict=True)
    aligned = all(number % 16 == 0 for column in numbers for number in column)
    for strides in (weight_row, weight_inner, panel_inner):
        aligned &= set(strides) == {1} or all(stride % 16 == 0 for stride in strides)
    return {
        "INNER_CONTIGUOUS": set(weight_inner) == {1},
        "ROW_CONTIGUOUS": set(weight_row) == {1},
        "PANEL_CONTIGUOUS": set(panel_col) == {1},
        "ALIGNED": aligned,
    }
