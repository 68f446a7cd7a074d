"""The verbs: operations on a whole weight, and of a panel against a whole basis, one name each.

The public functions check shapes and dtypes, choose a backend (:mod:`pissa_kernels.ops.dispatch`) and run its body
without recording an autograd graph. :mod:`pissa_kernels.ops.reference` has every body in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch
from .checks import WEIGHT_DTYPES, has_overlap
from .dispatch import BACKENDS

__all__ = [
    "BACKENDS",
    "WEIGHT_DTYPES",
    "backend",
    "has_overlap",
    "matmul",
    "normal",
    "orthonormalize",
    "rmatmul",
    "subtract_lowrank_",
    "sum_of_squares",
    "transpose_cast",
    "unsupported_reasons",
]


def backend(verb: str, weight: Tensor) -> str:
    """Name of the backend that runs ``verb`` on ``weight``: "csrc", "triton" or "torch".

    Raises:
        TypeError: the weight's dtype is not supported.
        ValueError: ``verb`` is not the name of a verb, or does not take a weight of this shape.
        RuntimeError: ``PISSA_KERNELS_BACKEND`` forces a backend that does not support the weight; the message says why.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> pk.ops.backend("matmul", torch.ones(4, 3)) in pk.ops.BACKENDS
        True
    """
    checks.check_verb(verb, weight)
    return dispatch.select(verb, weight)


def unsupported_reasons(verb: str, weight: Tensor) -> dict[str, list[str]]:
    """For each of :data:`BACKENDS`, why it cannot run ``verb`` on ``weight``; an empty list if it can.

    Raises:
        TypeError, ValueError: as :func:`backend`.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> pk.ops.unsupported_reasons("matmul", torch.ones(4, 3))["torch"]
        []
    """
    checks.check_verb(verb, weight)
    return dispatch.unsupported_reasons(verb, weight)


def matmul(weight: Tensor, X: Tensor, *, pieces: int = 3) -> Tensor:
    """W·X without a float32 copy of W.

    Args:
        weight: (m, n) or (batch, m, n), float32, float16 or bfloat16, any strides.
        X: (n, k) or (batch, n, k), float32, or float64 for a product in double precision; on the weight's device.
        pieces: number of bf16 pieces, 1, 2 or 3, that the panel is split into for tensor cores. The error relative to
            |W|·|X| is 2⁻⁹, 2⁻¹⁷ or that of float32. Backends that do not split are as accurate as 3 pieces.

    Returns:
        (m, k) or (batch, m, k), in the dtype of ``X``, contiguous.

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that do not match.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).bfloat16()
        >>> pk.ops.matmul(W, torch.tensor([[1.0], [-1.0]]))
        tensor([[-1.],
                [-1.],
                [-1.]])
    """
    checks.check_panel("matmul", weight, X, axis=-1)
    result: Tensor = _product("matmul", weight, X, pieces)
    return result


def rmatmul(weight: Tensor, Y: Tensor, *, pieces: int = 3) -> Tensor:
    """Wᵀ·Y without a copy or a transpose of W.

    Args:
        weight: (m, n) or (batch, m, n), float32, float16 or bfloat16, any strides.
        Y: (m, k) or (batch, m, k), float32, or float64 for a product in double precision; on the weight's device.
        pieces: as for :func:`matmul`.

    Returns:
        (n, k) or (batch, n, k), in the dtype of ``Y``, contiguous.

    Raises:
        TypeError, ValueError: as :func:`matmul`.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).bfloat16()
        >>> pk.ops.rmatmul(W, torch.tensor([[1.0], [0.0], [-1.0]]))
        tensor([[-4.],
                [-4.]])
    """
    checks.check_panel("rmatmul", weight, Y, axis=-2)
    result: Tensor = _product("rmatmul", weight, Y, pieces)
    return result


def normal(weight: Tensor, X: Tensor, *, pieces: int = 3) -> tuple[Tensor, Tensor]:
    """Y = W·X and Z = Wᵀ·Y, with one read of W where its rows are contiguous.

    Args:
        weight: (m, n) or (batch, m, n), float32, float16 or bfloat16, any strides.
        X: (n, k) or (batch, n, k), float32, or float64 for products in double precision; on the weight's device.
        pieces: as for :func:`matmul`.

    Returns:
        Y (m, k) and Z (n, k), or batches of these, in the dtype of ``X``, contiguous.

    Raises:
        TypeError, ValueError: as :func:`matmul`.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> Y, Z = pk.ops.normal(W, torch.tensor([[1.0], [-1.0]]))
        >>> Z
        tensor([[ -9.],
                [-12.]])
    """
    checks.check_panel("normal", weight, X, axis=-1)
    result: tuple[Tensor, Tensor] = _product("normal", weight, X, pieces)
    return result


def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ, contiguous, in ``dtype``: one read of W and one write of the result.

    Args:
        weight: (m, n), float32, float16 or bfloat16, any strides.
        dtype: float32, float16 or bfloat16.

    Returns:
        (n, m) in ``dtype``, contiguous, never sharing memory with ``weight``.

    Raises:
        TypeError: another dtype.
        ValueError: ``weight`` is not 2-D.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> pk.ops.transpose_cast(torch.tensor([[1.0, 2.0, 3.0]]).bfloat16(), torch.float32)
        tensor([[1.],
                [2.],
                [3.]])
    """
    checks.check_weight("transpose_cast", weight)
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"transpose_cast: dtype must be float32, float16 or bfloat16, got {dtype}")
    with torch.no_grad():
        result: Tensor = dispatch.bind("transpose_cast", weight)(weight, dtype)
    return result


def subtract_lowrank_(
    weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
) -> Tensor:
    """W −= s·B·A in place, summed in float32 and rounded once to the dtype of W.

    Args:
        weight: (out, in), float32, float16 or bfloat16, any strides that do not overlap; (in, out) with
            ``fan_in_fan_out``, and then W −= s·(B·A)ᵀ.
        lora_B: (out, r) float32.
        lora_A: (r, in) float32.
        scaling: s.
        fan_in_fan_out: the weight is stored (in, out), as in transformers' ``Conv1D``.

    Returns:
        ``weight``.

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that do not match, or a weight whose elements share memory.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> W = torch.full((2, 3), 5.0)
        >>> B, A = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> pk.ops.subtract_lowrank_(W, B, A, 2.0)
        tensor([[3., 5., 3.],
                [1., 5., 1.]])
    """
    checks.check_subtraction(weight, lora_B, lora_A, fan_in_fan_out)
    with torch.no_grad():
        dispatch.bind("subtract_lowrank_", weight)(weight, lora_B, lora_A, float(scaling), fan_in_fan_out)
    return weight


def sum_of_squares(weights: Tensor) -> Tensor:
    """‖W‖_F² of each weight of a batch, summed in float32 along rows and in float64 across them.

    Args:
        weights: (batch, m, n), float32, float16 or bfloat16, any strides.

    Returns:
        (batch,) float64, NaN or Inf where a weight holds one.

    Raises:
        TypeError: another dtype.
        ValueError: not a batch.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> pk.ops.sum_of_squares(torch.tensor([[[3.0, 4.0]]]))
        tensor([25.], dtype=torch.float64)
    """
    checks.check_weight("sum_of_squares", weights, stack=True)
    if weights.ndim != 3:
        raise ValueError(f"sum_of_squares: weights must be a batch (batch, m, n), got shape {tuple(weights.shape)}")
    with torch.no_grad():
        result: Tensor = dispatch.bind("sum_of_squares", weights)(weights)
    return result


def orthonormalize(panel: Tensor, basis: Tensor | None = None, near: int = 0) -> tuple[Tensor, Tensor]:
    """Block Gram–Schmidt with CholeskyQR: an orthonormal panel of the part of a panel that is orthogonal to a basis.

    Projections against the basis, each followed by a round of CholeskyQR, until a projection removes nothing. Two
    rounds are enough (Giraud et al. 2005) unless the first leaves only round-off. Round-off can point in any direction,
    also along the basis, and would then carry an orthogonality error of the basis over to the panel.

    Args:
        panel: (n, b), float32 or float64.
        basis: (k, n), orthonormal rows, of the panel's dtype and device, k + b ≤ n; None for an empty one.
        near: first of the rows that the panel is not orthogonal to in exact arithmetic, if that is known: the first
            projection uses only the rows from this one on.

    Returns:
        The panel (n, b), and the figures (3,): the smallest pivot of the Cholesky factor in the first round and in the
        last, 0 or NaN where the factorization failed; and the length that the first projection has left of the shortest
        column, relative to the longest column before it, 1 without a basis. Pivots below 1e-3 mean that the panel is
        not orthonormal: it is too close to being rank-deficient.

    Raises:
        TypeError: another dtype.
        ValueError: shapes, dtypes or devices that do not match.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> Z = torch.tensor([[3.0], [4.0]])
        >>> Q, (first_pivot, last_pivot, kept) = pk.ops.orthonormalize(Z)
        >>> torch.allclose(Q, Z / 5)
        True
        >>> first_pivot
        tensor(1.)
    """
    checks.check_orthonormalization(panel, basis, near)
    with torch.no_grad():
        result: tuple[Tensor, Tensor] = dispatch.bind("orthonormalize", panel, panel.dtype)(panel, basis, near)
    return result


def _product(verb: str, weight: Tensor, panel: Tensor, pieces: int) -> Any:
    checks.check_pieces(verb, pieces)
    with torch.no_grad():
        return dispatch.bind(verb, weight, panel.dtype)(weight, panel, pieces)
