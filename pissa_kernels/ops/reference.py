"""Every verb in plain torch: what runs where nothing faster was built, and the oracle for every faster backend.

A 16-bit weight is never copied to float32 as a whole. It is read in row blocks that are widened into one small buffer
and multiplied from there, so a product costs one read of the weight and a few MiB. On CPUs without bf16 instructions
this is also the fast way: torch's own bf16 product of a 4096×4096 weight and 24 columns takes 260 ms on two AVX2 cores.

Products take one weight (m, n) or a stack of them (batch, m, n). Measured there on a 4096×4096 bf16 weight, in ms:

    columns   W·X    Wᵀ·Y    both from one read (``normal``)   of which widening, once
      16      5.6     6.4               10.4                            1.6
      32      8.4     9.2               16.0                            1.6
      64     14.2    15.1               27.8                            1.6
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

VERBS = ("matmul", "rmatmul", "normal", "transpose_cast", "subtract_lowrank_", "sum_of_squares", "gram_schmidt")
# Elements of the widened block. 4 MiB of float32 stay inside a CPU's L3 slice; a GPU wants few, large launches.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
# Elements of a strip that is transposed at a time, on a CPU.
TRANSPOSE_ELEMENTS = 1 << 17
# Columns of Wᵀ·Y below which another thread is not worth its own matrix product.
COLUMNS_PER_THREAD = 256
# Columns up to which a panel is projected as rows: BLAS takes two to six times as long over eight columns as over eight
# rows.
NARROW = 16


def verbs(device: str) -> tuple[str, ...]:
    """All of them, everywhere."""
    return VERBS


def unsupported_reasons(verb: str, weight: Tensor) -> list[str]:
    """None: plain torch runs everywhere."""
    return []


def is_column_major(weight: Tensor) -> bool:
    """Whether walking down a column of ``weight`` (…, m, n) is the contiguous direction, as in a transposed view."""
    return abs(weight.stride(-2)) < abs(weight.stride(-1))


def row_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(start, stop, block)`` over the rows of ``weight`` (…, m, n): the block (…, rows, n) in ``dtype``.

    Blocks share one buffer: use each before asking for the next. A weight that BLAS can read as it is, in ``dtype`` and
    with one direction contiguous, is its own block.
    """
    *batch, m, n = weight.shape
    if weight.dtype == dtype and 1 in weight.stride()[-2:]:
        if m:
            yield 0, m, weight
        return
    stack = max(1, n * weight.shape[:-2].numel())
    rows = max(1, min(m, BLOCK_ELEMENTS.get(weight.device.type, 1 << 24) // stack))
    turned = weight.stride(-2) < weight.stride(-1)  # to be kept: to turn it back takes longer than to widen it
    shape = (n, rows) if turned else (rows, n)
    buffer = torch.empty(*batch, *shape, dtype=dtype, device=weight.device)
    buffer = buffer.mT if turned else buffer
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        block = buffer[..., : stop - start, :]
        block.copy_(weight[..., start:stop, :])
        yield start, stop, block


class _AdjointSum:
    """Σ blockᵀ·Y over row blocks, each thread with columns of its own.

    BLAS splits the long inner dimension of this product badly: with 16 columns, two products of half the weight each,
    side by side, take half the time of one (4.5 against 9.2 ms). They are summed as (parts, k, n/parts).
    """

    def __init__(self, weight: Tensor, panel: Tensor) -> None:
        self.columns = n = weight.shape[-1]
        self.width = panel.shape[-1]
        self.stacked = weight.ndim == 3
        threads = torch.get_num_threads() if weight.device.type == "cpu" and not self.stacked else 1
        parts = min(threads, n // COLUMNS_PER_THREAD) or 1
        self.parts = parts if n % parts == 0 else 1
        leading = len(weight) if self.stacked else self.parts
        self.total = panel.new_zeros(leading, self.width, n // self.parts)

    def add(self, block: Tensor, Y: Tensor) -> None:
        if self.stacked:
            self.total.baddbmm_(Y.mT, block)
        elif self.parts == 1:
            self.total[0].addmm_(Y.mT, block)
        else:
            split = block.view(len(block), self.parts, -1).transpose(0, 1)
            self.total.baddbmm_(Y.mT.expand(self.parts, -1, -1), split)

    def result(self) -> Tensor:
        """(n, k), or (batch, n, k), contiguous."""
        columns = self.total.mT.contiguous()
        return columns if self.stacked else columns.view(self.columns, self.width)


def _product(weight: Tensor, X: Tensor) -> Tensor:
    out = X.new_empty(*weight.shape[:-1], X.shape[-1])
    for start, stop, block in row_blocks(weight, X.dtype):
        if weight.ndim == 2:
            torch.mm(block, X, out=out[start:stop])
        else:
            out[:, start:stop] = block @ X
    return out


def _adjoint_product(weight: Tensor, Y: Tensor) -> Tensor:
    total = _AdjointSum(weight, Y)
    for start, stop, block in row_blocks(weight, Y.dtype):
        total.add(block, Y[..., start:stop, :])
    return total.result()


def matmul(weight: Tensor, X: Tensor, pieces: int = 3) -> Tensor:
    """W·X in the arithmetic of ``X``, whatever ``pieces``; see :func:`pissa_kernels.ops.matmul`."""
    return _adjoint_product(weight.mT, X) if is_column_major(weight) else _product(weight, X)


def rmatmul(weight: Tensor, Y: Tensor, pieces: int = 3) -> Tensor:
    """Wᵀ·Y in the arithmetic of ``Y``, whatever ``pieces``; see :func:`pissa_kernels.ops.rmatmul`."""
    return _product(weight.mT, Y) if is_column_major(weight) else _adjoint_product(weight, Y)


def normal(weight: Tensor, X: Tensor, pieces: int = 3) -> tuple[Tensor, Tensor]:
    """Y = W·X and Wᵀ·Y in the arithmetic of ``X``, whatever ``pieces``; see :func:`pissa_kernels.ops.normal`."""
    if is_column_major(weight):  # Wᵀ needs all of Y first
        Y = matmul(weight, X)
        return Y, rmatmul(weight, Y)
    out = X.new_empty(*weight.shape[:-1], X.shape[-1])
    total = _AdjointSum(weight, X)
    for start, stop, block in row_blocks(weight, X.dtype):
        Y = out[..., start:stop, :]
        if weight.ndim == 2:
            torch.mm(block, X, out=Y)
        else:
            Y.copy_(block @ X)
        total.add(block, Y)
    return out, total.result()


def grouped(verb: str, weights: Sequence[Tensor], panels: Sequence[Tensor], pieces: int = 3) -> list[Tensor]:
    """``matmul`` or ``rmatmul`` of each weight with its panel, one after the other."""
    product = {"matmul": matmul, "rmatmul": rmatmul}[verb]
    return [product(weight, panel) for weight, panel in zip(weights, panels, strict=True)]


def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ in ``dtype``; see :func:`pissa_kernels.ops.transpose_cast`."""
    m, n = weight.shape
    out = torch.empty(n, m, dtype=dtype, device=weight.device)
    if weight.device.type != "cpu" or is_column_major(weight):
        return out.copy_(weight.mT)
    # a strip of rows at a time stays in the caches: two thirds of the time of one copy
    rows = max(32, TRANSPOSE_ELEMENTS // max(n, 1))
    for start in range(0, m, rows):
        strip = slice(start, min(start + rows, m))
        out[:, strip].copy_(weight[strip].mT)
    return out


def as_stored(weight: Tensor, lora_B: Tensor, lora_A: Tensor, fan_in_fan_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A view of the weight with contiguous rows where it has any, and the factors (rows, r) and (r, cols) of it."""
    view, left, right = (weight.mT, lora_B, lora_A) if fan_in_fan_out else (weight, lora_B, lora_A)
    return (view.mT, right.mT, left.mT) if is_column_major(view) else (view, left, right)


def subtract_lowrank_(
    weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
) -> Tensor:
    """W −= s·B·A in place; see :func:`pissa_kernels.ops.subtract_lowrank_`."""
    view, left, right = as_stored(weight, lora_B, lora_A, fan_in_fan_out)
    for start, stop, block in row_blocks(view, torch.float32):
        block.addmm_(left[start:stop], right, alpha=-scaling)
        if block is not view:
            view[start:stop].copy_(block)
    return weight


class CholeskyQR(NamedTuple):
    """One round of CholeskyQR on Z (batch, n, b).

    Attributes:
        panel: (batch, n, b) Z·change.
        change: (batch, b, b).
        pivot: (batch,) the smallest pivot of the Gram matrix's factor; 0 or NaN where the panel is worthless.
        shortest: (batch,) the shortest column norm of Z.
    """

    panel: Tensor
    change: Tensor
    pivot: Tensor
    shortest: Tensor


def cholesky_qr(Z: Tensor) -> CholeskyQR:
    """Z made orthonormal as far as one round does it: to ε·cond(Z)².

    The factor's inverse is formed and multiplied with: a triangular solve with a 4096×64 panel takes three times as
    long.
    """
    gram = Z.mT @ Z
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norms.reciprocal()
    factor, info = torch.linalg.cholesky_ex(gram * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    pivot = factor.diagonal(dim1=-2, dim2=-1).amin(-1).masked_fill(info != 0, 0.0)
    change = torch.linalg.solve_triangular(factor, torch.diag_embed(scale), upper=False).mT
    return CholeskyQR(Z @ change, change, pivot, norms.amin(-1))


def project_out(Z: Tensor, basis: Tensor | None) -> Tensor:
    """Z (batch, n, b) less its part along the orthonormal rows of a basis (batch, k, n)."""
    if basis is None or not basis.shape[1]:
        return Z
    if Z.shape[-1] <= NARROW:
        return torch.baddbmm(Z.mT, Z.mT @ basis.mT, basis, alpha=-1).mT
    return torch.baddbmm(Z, basis.mT, basis @ Z, alpha=-1)


def gram_schmidt(panel: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One round of block Gram–Schmidt and CholeskyQR; see :func:`pissa_kernels.ops.gram_schmidt`."""
    panel, _, pivot, shortest = cholesky_qr(project_out(panel, basis))
    return panel, pivot, shortest


def sum_of_squares(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """‖scale·W‖_F² of each weight of a stack (batch, m, n), float64 (batch,), ``scale`` (batch, 1, 1).

    In float32 along rows and in float64 across them. NaN or Inf in W show in the result.
    """
    total = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    view = weight.mT if is_column_major(weight) else weight
    for _, _, block in row_blocks(view, torch.float32):
        # one norm of the whole block would lose five digits: torch sums it in a handful of float32 lanes
        norms = torch.linalg.vector_norm(block if scale is None else block * scale, dim=-1)
        total += norms.double().square().sum(dim=-1)
    return total
