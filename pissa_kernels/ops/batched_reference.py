"""The operations of :mod:`.batched` in plain torch, one matrix after another.

A batched call of BLAS or LAPACK may choose another algorithm for another number of matrices, and its bits with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from .batched import Panel, Update, Weights


def product(
    left: Weights | Panel | Tensor,
    right: Panel | Tensor,
    *,
    precision: int,
    update: Update | None = None,
    values: bool = True,
    pieces: int = 0,
) -> Panel:
    """left·right for each matrix of a batch.

    Args:
        left: weights (m, n); or panels (batch, m, n) or their float32 values, which may be transposed views.
        right: (batch, n, k); a panel, or its float32 values.
        precision: number of pieces of ``right`` that are used for bfloat16 weights, 1, 2 or 3. For other weights its
            values are used: 1 allows TF32; 2 and 3 are float32. Panels are multiplied with 3, which is float32.
        update: what is added up before the result is stored; None for the product itself.
        values: whether the result has float32 values.
        pieces: number of pieces of the result, 0 for none.

    Returns:
        (batch, m, k).
    """
    if isinstance(left, Weights):
        matrices: Sequence[Tensor] = left.tensors
        panel = _numbers(right, precision if left.dtype == torch.bfloat16 else 0)
    else:
        matrices, panel = _numbers(left, precision).unbind(), _numbers(right, precision)
    products = [reference.matmul(matrix, panel[index].contiguous()) for index, matrix in enumerate(matrices)]
    return finished(torch.stack(products), update=update, values=values, pieces=pieces)


def _numbers(panel: Panel | Tensor, pieces: int) -> Tensor:
    """The sum of the largest pieces of a panel; its values if ``pieces`` is 0."""
    values, found = (panel, None) if isinstance(panel, Tensor) else panel
    if found is None or not pieces:
        assert values is not None
        return values if pieces in (0, 3) else split(values, pieces).float().sum(0)
    return found[:pieces].float().sum(0)


def finished(products: Tensor, *, update: Update | None = None, values: bool = True, pieces: int = 0) -> Panel:
    """The result of :func:`product` from left·right (batch, m, k), which may be overwritten."""
    if update is not None:
        products = products.mul_(update.alpha[:, None, None])
        if update.current is not None:
            products = products.add_(update.current, alpha=update.beta)
        if update.previous is not None:
            products = products.add_(update.previous, alpha=update.gamma)
    return Panel(products if values else None, split(products, pieces) if pieces else None)


def split(values: Tensor, pieces: int) -> Tensor:
    """The ``pieces`` largest bfloat16 pieces of float32 values (…), stacked (pieces, …)."""
    found, rest = [], values
    for _ in range(pieces):
        found.append(rest.bfloat16())
        rest = rest - found[-1].float()
    return torch.stack(found)


def compile_ahead(dry_run: Callable[[], object], device: torch.device) -> None:
    """Compile what a function launches on a device. There is nothing to compile, and the function is not called."""


def inverse_cholesky(gram: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """For each Gram matrix G = ZᵀZ the upper triangular C with (Z·C)ᵀ(Z·C) ≈ I, by a shifted Cholesky factorization.

    With D = diag(G): D^(−1/2)·G·D^(−1/2) + shift·I = L·Lᵀ and C = D^(−1/2)·L^(−ᵀ). Columns of zeros stay zero.

    Args:
        gram: (batch, b, b) float32, symmetric.
        shift: added to the unit diagonal.

    Returns:
        C (batch, b, b) float32, and the diagonal of L times that of D^(1/2) (batch, b): the diagonal of R in Z = Q·R.
        NaN in a matrix where the factorization failed.
    """
    changes, diagonals = [], []
    for matrix in gram:
        norms = matrix.diagonal().clamp(min=0).sqrt()
        scale = torch.where(norms > 0, norms.reciprocal(), 0.0)
        scaled = matrix * scale.unsqueeze(-1) * scale
        scaled.diagonal().fill_(1.0 + shift)
        factor, info = torch.linalg.cholesky_ex(scaled)
        factor = torch.where(info == 0, factor, torch.nan)
        changes.append(torch.linalg.solve_triangular(factor, torch.diag(scale), upper=False).mT)
        diagonals.append(factor.diagonal() * norms)
    return torch.stack(changes), torch.stack(diagonals)


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, accurate relative to √(a_ii·a_jj) if these are semidefinite.

    In float64, because LAPACK's methods are accurate relative to the norm only.

    Args:
        matrices: (batch, b, b) float32.

    Returns:
        Eigenvalues (batch, b), descending, and eigenvectors (batch, b, b); NaN where a matrix is not finite.
    """
    finite = torch.isfinite(matrices).all(-1).all(-1)[:, None, None]
    pairs = [torch.linalg.eigh(matrix) for matrix in torch.where(finite, matrices, 0.0).double()]
    values = torch.stack([value.flip(-1) for value, _ in pairs]).float()
    vectors = torch.stack([vector.flip(-1) for _, vector in pairs]).float()
    return torch.where(finite[..., 0], values, torch.nan), torch.where(finite, vectors, torch.nan)


def sum_of_squares(weights: Weights) -> Tensor:
    """‖W‖_F² of each weight (batch,) float64, NaN or Inf where a weight holds one."""
    return torch.cat([reference.sum_of_squares(weight.unsqueeze(0)) for weight in weights.tensors])


def subtract_lowrank_(weights: Weights, lora_B: Tensor, lora_A: Tensor, scalings: Tensor) -> None:
    """W −= s·B·A in place, for each weight (out, in) of a batch.

    Args:
        weights: (out, in) each, any strides.
        lora_B: (batch, out, r) float32, float16 or bfloat16. 16-bit factors take one product on tensor cores.
        lora_A: (batch, r, in), as ``lora_B``.
        scalings: (batch,) float64 on the CPU.
    """
    numbers = scalings.tolist()
    for weight, left, right, scaling in zip(weights.tensors, lora_B, lora_A, numbers, strict=True):
        reference.subtract_lowrank_(weight, left.float(), right.float(), scaling)
