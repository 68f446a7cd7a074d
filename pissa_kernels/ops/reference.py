"""Every verb in plain torch: the fallback of every other backend, and the reference that tests compare them with.

A 16-bit weight is never upcast to float32 as a whole. Row blocks of it are upcast into one small buffer and multiplied
from there, so that a product costs one read of the weight and a few MiB. On CPUs without bf16 instructions this is also
faster: torch's own bf16 product of a 4096×4096 weight and 24 columns takes 260 ms on two AVX2 cores.

Products take a weight (m, n) or a batch of weights (batch, m, n). Times in ms on the same cores, for a 4096×4096 bf16
weight; the last column is the time of upcasting it once, which the others include:

    columns   W·X    Wᵀ·Y    both from one read (``normal``)   upcasting
      16      5.6     6.4               10.4                     1.6
      32      8.4     9.2               16.0                     1.6
      64     14.2    15.1               27.8                     1.6
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import VERBS
from .panels import orthonormalize as orthonormalize
from .panels import recurrence, ritz_pairs, triplets_of

# Elements of the buffer. On a CPU 4 MiB of float32 stay in a slice of L3; a GPU is faster with few, large launches.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
# Panels of columns in which a Gram matrix of so many columns or more is computed.
GRAM_PANELS, LARGE_GRAM = 4, 256
# Elements of the rows that are transposed at a time on a CPU.
TRANSPOSE_ELEMENTS = 1 << 17
# Rows of Wᵀ·Y per thread, below which a product for each thread costs more than it saves.
COLUMNS_PER_THREAD = 256


def verbs(device: str) -> tuple[str, ...]:
    """The names of all verbs, on every device."""
    return VERBS


def unsupported_reasons(verb: str, weight: Tensor) -> list[str]:
    """An empty list: plain torch supports every weight."""
    return []


def is_column_major(weight: Tensor) -> bool:
    """Whether the columns of ``weight`` (…, m, n) are contiguous rather than its rows, as in a transposed view."""
    return abs(weight.stride(-2)) < abs(weight.stride(-1))


def row_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(start, stop, block)`` for blocks of rows of ``weight`` (…, m, n): ``block`` (…, rows, n) in ``dtype``.

    Each block overwrites the one before it in a common buffer. A weight that BLAS can read as it is, in ``dtype`` and
    with contiguous rows or columns, is yielded as a single block.
    """
    *batch, m, n = weight.shape
    if weight.dtype == dtype and 1 in weight.stride()[-2:]:
        if m:
            yield 0, m, weight
        return
    row_elements = max(1, n * weight.shape[:-2].numel())  # of all weights of the batch
    rows = max(1, min(m, BLOCK_ELEMENTS.get(weight.device.type, 1 << 24) // row_elements))
    transposed = weight.stride(-2) < weight.stride(-1)  # so is the buffer, or copying would cost more than upcasting
    shape = (n, rows) if transposed else (rows, n)
    buffer = torch.empty(*batch, *shape, dtype=dtype, device=weight.device)
    buffer = buffer.mT if transposed else buffer
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        block = buffer[..., : stop - start, :]
        block.copy_(weight[..., start:stop, :])
        yield start, stop, block


class _AdjointSum:
    """Σ blockᵀ·Y over row blocks, with a product for each thread.

    BLAS parallelizes the long inner dimension of this product badly: for 16 columns, two concurrent products of half of
    the weight's columns each take half the time of one (4.5 against 9.2 ms). The sum is stored as (parts, k, n/parts).
    """

    def __init__(self, weight: Tensor, panel: Tensor) -> None:
        self.columns = n = weight.shape[-1]
        self.width = panel.shape[-1]
        self.batched = weight.ndim == 3
        threads = torch.get_num_threads() if weight.device.type == "cpu" and not self.batched else 1
        parts = min(threads, n // COLUMNS_PER_THREAD) or 1
        self.parts = parts if n % parts == 0 else 1
        leading = len(weight) if self.batched else self.parts
        self.total = panel.new_zeros(leading, self.width, n // self.parts)

    def add(self, block: Tensor, Y: Tensor) -> None:
        if self.batched:
            self.total.baddbmm_(Y.mT, block)
        elif self.parts == 1:
            self.total[0].addmm_(Y.mT, block)
        else:
            split = block.view(len(block), self.parts, -1).transpose(0, 1)
            self.total.baddbmm_(Y.mT.expand(self.parts, -1, -1), split)

    def result(self) -> Tensor:
        """The sum, (n, k) or (batch, n, k), contiguous."""
        columns = self.total.mT.contiguous()
        return columns if self.batched else columns.view(self.columns, self.width)


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
    """W·X in the precision of ``X``; ``pieces`` is ignored. See :func:`pissa_kernels.ops.matmul`."""
    return _adjoint_product(weight.mT, X) if is_column_major(weight) else _product(weight, X)


def rmatmul(weight: Tensor, Y: Tensor, pieces: int = 3) -> Tensor:
    """Wᵀ·Y in the precision of ``Y``; ``pieces`` is ignored. See :func:`pissa_kernels.ops.rmatmul`."""
    return _product(weight.mT, Y) if is_column_major(weight) else _adjoint_product(weight, Y)


def normal(weight: Tensor, X: Tensor, pieces: int = 3) -> tuple[Tensor, Tensor]:
    """Y = W·X and Wᵀ·Y in the precision of ``X``; ``pieces`` is ignored. See :func:`pissa_kernels.ops.normal`."""
    if is_column_major(weight):  # Wᵀ·Y needs the whole of Y
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


def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ in ``dtype``. See :func:`pissa_kernels.ops.transpose_cast`."""
    m, n = weight.shape
    out = torch.empty(n, m, dtype=dtype, device=weight.device)
    if weight.device.type != "cpu" or is_column_major(weight):
        return out.copy_(weight.mT)
    # a block of rows at a time stays in cache, which takes two thirds of the time of one copy
    rows = max(32, TRANSPOSE_ELEMENTS // max(n, 1))
    for start in range(0, m, rows):
        block = slice(start, min(start + rows, m))
        out[:, block].copy_(weight[block].mT)
    return out


def as_stored(weight: Tensor, lora_B: Tensor, lora_A: Tensor, fan_in_fan_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A view of the weight whose rows are contiguous if possible, and its factors (rows, r) and (r, cols)."""
    view, left, right = (weight.mT, lora_B, lora_A) if fan_in_fan_out else (weight, lora_B, lora_A)
    return (view.mT, right.mT, left.mT) if is_column_major(view) else (view, left, right)


def subtract_lowrank_(
    weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
) -> Tensor:
    """W −= s·B·A in place. See :func:`pissa_kernels.ops.subtract_lowrank_`."""
    view, left, right = as_stored(weight, lora_B, lora_A, fan_in_fan_out)
    for start, stop, block in row_blocks(view, torch.float32):
        block.addmm_(left[start:stop], right, alpha=-scaling)
        if block is not view:
            view[start:stop].copy_(block)
    return weight


def chebyshev_filter(
    weight: Tensor, X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int = 3, gram: bool = False
) -> Tensor:
    """T(2H/edge − 1)·X for H = WᵀW and the Chebyshev polynomial T of a degree. It grows above ``edge``.

    Args:
        weight: W (m, n) of any supported dtype; H itself (n, n) float32 with ``gram``.
        X: (n, b) float32 or float64.
        HX: (n, b) H·X.
        edge: upper end of [0, edge], where the polynomial is at most 1.
        degree: at least 1; the number of products with H is one less.
        pieces: bf16 pieces of the panel in the last product; one less in the others, but at least one, because the
            products that follow damp their rounding errors. Ignored here.
        gram: whether ``weight`` is H.
    """
    if gram:
        return recurrence(lambda current, _: weight @ current, X, HX, edge, degree, pieces)
    return recurrence(lambda current, _: normal(weight, current)[1], X, HX, edge, degree, pieces)


def ritz(weight: Tensor, Z: Tensor, rank: int, gram: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz pairs of H = WᵀW on the range of Z (n, b).

    Args:
        weight: W (m, n) of any supported dtype; H itself (n, n) float32 with ``gram``.
        Z: (n, b) float32. It is orthonormalized first.
        rank: number of pairs whose residuals are wanted.
        gram: whether ``weight`` is H.

    Returns:
        Ritz vectors X (n, b), H·X, and figures (b + rank + 2,): the Ritz values, ascending, ‖H·x − θ·x‖ of the last
        ``rank`` pairs, and the smallest pivots of the orthonormalization's first and last round. Values and residuals
        are NaN where LAPACK's eigensolver fails, and where a pivot is too small, so that there is no orthonormal Q.
    """

    def project(Q: Tensor) -> tuple[Tensor, Tensor]:
        if gram:
            HQ = weight @ Q
            return HQ, Q.mT @ HQ
        # (WQ)ᵀ(WQ), not Qᵀ(HQ), which is less accurate in directions whose singular values are small relative to ‖W‖
        WQ, HQ = normal(weight, Q)
        return HQ, WQ.mT @ WQ

    return ritz_pairs(Z, rank, project)


def triplets(weight: Tensor, V: Tensor, rank: int, image: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of W on the range of V: W·V = Q·R, R = X·diag(S)·Zᵀ in float64, U = Q·X.

    Args:
        weight: W (m, n) of any supported dtype.
        V: (n, b) float32. It is orthonormalized first.
        rank: number of triplets, at most b.
        image: (m, b) W·V where it is known, for a V that is orthonormal up to round-off.

    Returns:
        U (m, rank), V·Z (n, rank), and figures (b + rank + 2,): S (b,), descending, max(‖W·vᵢ − σᵢ·uᵢ‖,
        ‖Wᵀ·uᵢ − σᵢ·vᵢ‖) of each triplet, and the smallest pivots of the two orthonormalizations' first and last
        rounds. S and the residuals are NaN where LAPACK's SVD fails, and where a pivot is too small.
    """
    return triplets_of(V, rank, image, lambda X: matmul(weight, X), lambda U: rmatmul(weight, U))


def sum_of_squares(weight: Tensor, scale: float = 1.0) -> Tensor:
    """‖scale·W‖_F² of each weight of a batch, summed in float32 along rows and in float64 across them.

    Args:
        weight: (batch, m, n), float32, float16 or bfloat16, any strides.
        scale: a power of two.

    Returns:
        (batch,) float64, NaN or Inf where a weight holds one.
    """
    total = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    view = weight.mT if is_column_major(weight) else weight
    for _, _, block in row_blocks(view, torch.float32):
        # the norm of the whole block would lose five digits, because torch sums it in a few float32 lanes
        norms = torch.linalg.vector_norm(block if scale == 1.0 else block * scale, dim=-1)
        total += norms.double().square().sum(dim=-1)
    return total


def gram(weight: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """(scale·W)ᵀ(scale·W).

    Args:
        weight: (m, n), float32, float16 or bfloat16, any strides.
        dtype: float32 or float64, in which the products are summed.
        scale: a power of two.

    Returns:
        (n, n) in ``dtype``, symmetric up to round-off.
    """
    n = weight.shape[1]
    total = torch.zeros(n, n, dtype=dtype, device=weight.device)
    # the lower triangle, in panels of columns: BLAS takes a fifth to a quarter longer for the whole
    edges = [n * part // GRAM_PANELS for part in range(GRAM_PANELS + 1)] if n >= LARGE_GRAM else [0, n]
    for _, _, block in row_blocks(weight, dtype):
        scaled = block if scale == 1.0 else block * scale
        for begin, end in itertools.pairwise(edges):
            total[begin:, begin:end].addmm_(scaled[:, begin:].mT, scaled[:, begin:end])
    for begin, end in itertools.pairwise(edges):
        total[begin:end, end:] = total[end:, begin:end].mT
    return total
