"""Every verb in plain torch: the CPU path, and the oracle for every faster backend.

A 16-bit weight is never copied to float32 as a whole. It is read in row blocks that are widened into
one small buffer and multiplied from there, so a product costs one read of the weight and a few MiB.
On CPUs without bf16 instructions this is also the fast way: a 4096×4096 bf16 weight times 24 float32
columns takes 8 ms on two AVX2 cores, of which widening is 1.4 ms; torch's own bf16 product takes 260 ms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of the widened block. 2 MiB of float32 stays inside a CPU's L2/L3 slice; a GPU wants few, large launches.
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


def is_column_major(weight: Tensor) -> bool:
    """Whether walking down a column of ``weight`` (m, n) is the contiguous direction, as in a transposed view."""
    return abs(weight.stride(0)) < abs(weight.stride(1))


def row_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(start, stop, block)`` over the rows of ``weight`` (m, n), the block in ``dtype``.

    Blocks share one buffer: use each before asking for the next. A weight already in ``dtype`` is its own block.
    """
    m, n = weight.shape
    if weight.dtype == dtype:
        if m:
            yield 0, m, weight
        return
    rows = min(m, max(1, BLOCK_ELEMENTS.get(weight.device.type, 1 << 24) // max(1, n)))
    buffer = torch.empty(rows, n, dtype=dtype, device=weight.device)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        block = buffer[: stop - start]
        block.copy_(weight[start:stop])
        yield start, stop, block


def _product(weight: Tensor, X: Tensor) -> Tensor:
    out = torch.empty(weight.shape[0], X.shape[1], dtype=X.dtype, device=weight.device)
    for start, stop, block in row_blocks(weight, X.dtype):
        torch.mm(block, X, out=out[start:stop])
    return out


def _adjoint_product(weight: Tensor, Y: Tensor) -> Tensor:
    out = torch.zeros(weight.shape[1], Y.shape[1], dtype=Y.dtype, device=weight.device)
    for start, stop, block in row_blocks(weight, Y.dtype):
        out.addmm_(block.mT, Y[start:stop])
    return out


def matmul(weight: Tensor, X: Tensor) -> Tensor:
    """W·X in the arithmetic of ``X``; see :func:`pissa_kernels.ops.matmul`."""
    return _adjoint_product(weight.mT, X) if is_column_major(weight) else _product(weight, X)


def rmatmul(weight: Tensor, Y: Tensor) -> Tensor:
    """Wᵀ·Y in the arithmetic of ``Y``; see :func:`pissa_kernels.ops.rmatmul`."""
    return _product(weight.mT, Y) if is_column_major(weight) else _adjoint_product(weight, Y)


def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ in ``dtype``; see :func:`pissa_kernels.ops.transpose_cast`."""
    out = torch.empty(weight.shape[1], weight.shape[0], dtype=dtype, device=weight.device)
    return out.copy_(weight.mT)


def subtract_lowrank_(
    weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
) -> Tensor:
    """W −= s·B·A in place; see :func:`pissa_kernels.ops.subtract_lowrank_`."""
    view, left, right = (weight.mT, lora_B, lora_A) if fan_in_fan_out else (weight, lora_B, lora_A)
    if is_column_major(view):
        view, left, right = view.mT, right.mT, left.mT
    for start, stop, block in row_blocks(view, torch.float32):
        block.addmm_(left[start:stop], right, alpha=-scaling)
        if block.dtype != weight.dtype:
            view[start:stop].copy_(block)
    return weight


def sum_of_squares(weight: Tensor, scale: float = 1.0) -> float:
    """‖scale·W‖_F², in float32 along rows and in float64 across them. NaN or Inf in W show in the result."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    view = weight.mT if is_column_major(weight) else weight
    for _, _, block in row_blocks(view, torch.float32):
        # one norm of the whole block would lose five digits: torch sums it in a handful of float32 lanes
        norms = torch.linalg.vector_norm(block if scale == 1.0 else block * scale, dim=1)
        total += norms.double().square().sum()
    return float(total)
