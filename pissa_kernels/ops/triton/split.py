"""The bf16 pieces of float32 numbers, in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compilation import launch
from .launch import parameters


@triton.jit
def split_kernel(values, pieces, size, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """pieces (PIECES, size), largest first: their sum is values (size), up to the next piece."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(values + index, mask=index < size, other=0.0)
    for piece in tl.static_range(PIECES):
        rounded = rest.to(tl.bfloat16)
        tl.store(pieces + piece * tl.cast(size, tl.int64) + index, rounded, mask=index < size)
        rest -= rounded.to(tl.float32)


def split(values: Tensor, pieces: int) -> Tensor:
    """The ``pieces`` largest bfloat16 pieces of float32 values (…), stacked (pieces, …)."""
    values = values.contiguous()
    found = values.new_empty(pieces, *values.shape, dtype=torch.bfloat16)
    size = values.numel()
    if found.numel() == 0:
        return found
    options = parameters("split", values.device, bytes=values.element_size())
    with torch.cuda.device_of(values):
        launch(split_kernel, (triton.cdiv(size, options["BLOCK"]),), values, found, size, PIECES=pieces, **options)
    return found
