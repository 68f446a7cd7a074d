"""The verbs: what this package does with a whole weight, and with a panel against a whole basis, under one name each.

Shapes are checked here, so that the bodies hold only maths; :mod:`.dispatch` chooses whose body runs. No verb records
an autograd graph.
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
    "gram_schmidt",
    "has_overlap",
    "matmul",
    "normal",
    "rmatmul",
    "subtract_lowrank_",
    "sum_of_squares",
    "transpose_cast",
    "unsupported_reasons",
]


def backend(verb: str, weight: Tensor) -> str:
    """Name of the backend that ``verb`` would run on for ``weight``: "csrc", "triton" or "torch".

    Raises:
        TypeError: a weight of another dtype than the verbs take.
        ValueError: ``verb`` is not one of :data:`checks.VERBS`, or the weight's shape is not one that it takes.
        RuntimeError: ``PISSA_KERNELS_BACKEND`` forces a backend that cannot run it, with its reasons.
    """
    checks.check_verb(verb, weight)
    return dispatch.select(verb, weight)


def unsupported_reasons(verb: str, weight: Tensor) -> dict[str, list[str]]:
    """For each of :data:`BACKENDS`, its reasons against running ``verb`` on ``weight``; an empty list where it can.

    Raises:
        TypeError, ValueError: as :func:`backend` does.
    """
    checks.check_verb(verb, weight)
    return dispatch.unsupported_reasons(verb, weight)


def matmul(weight: Tensor, X: Tensor, *, pieces: int = 3) -> Tensor:
    """W·X without a float32 copy of W.

    Args:
        weight: (m, n), or (batch, m, n), in float32, float16 or bfloat16, any strides.
        X: (n, k), or (batch, n, k), in float32, or float64 for a product in double precision; same device.
        pieces: bf16 pieces (1, 2 or 3) that tensor cores see the panel as: an error of 2⁻⁹, 2⁻¹⁷ or
            float32's own, relative to |W|·|X|. A backend without such arithmetic is as good as 3 with any.

    Returns:
        (m, k), or (batch, m, k), in the dtype of ``X``, contiguous.

    Raises:
        TypeError: a dtype other than those.
        ValueError: shapes or devices that do not fit.
    """
    checks.check_panel("matmul", weight, X, axis=-1)
    result: Tensor = _product("matmul", weight, X, pieces)
    return result


def rmatmul(weight: Tensor, Y: Tensor, *, pieces: int = 3) -> Tensor:
    """Wᵀ·Y without a copy or a transpose of W.

    Args:
        weight: (m, n), or (batch, m, n), in float32, float16 or bfloat16, any strides.
        Y: (m, k), or (batch, m, k), in float32, or float64 for a product in double precision; same device.
        pieces: bf16 pieces (1, 2 or 3) that tensor cores see the panel as: an error of 2⁻⁹, 2⁻¹⁷ or
            float32's own, relative to |Wᵀ|·|Y|. A backend without such arithmetic is as good as 3 with any.

    Returns:
        (n, k), or (batch, n, k), in the dtype of ``Y``, contiguous.

    Raises:
        TypeError: a dtype other than those.
        ValueError: shapes or devices that do not fit.
    """
    checks.check_panel("rmatmul", weight, Y, axis=-2)
    result: Tensor = _product("rmatmul", weight, Y, pieces)
    return result


def normal(weight: Tensor, X: Tensor, *, pieces: int = 3) -> tuple[Tensor, Tensor]:
    """Y = W·X and Z = Wᵀ·Y, from one read of W where its rows are contiguous.

    Args:
        weight: (m, n), or (batch, m, n), in float32, float16 or bfloat16, any strides.
        X: (n, k), or (batch, n, k), in float32, or float64 for products in double precision; same device.
        pieces: bf16 pieces (1, 2 or 3) that tensor cores see the panel as: an error of 2⁻⁹, 2⁻¹⁷ or
            float32's own, relative to |W|·|X|. A backend without such arithmetic is as good as 3 with any.

    Returns:
        Y (m, k) and Z (n, k), or stacks of these, in the dtype of ``X``, contiguous.

    Raises:
        TypeError: a dtype other than those.
        ValueError: shapes or devices that do not fit.
    """
    checks.check_panel("normal", weight, X, axis=-1)
    result: tuple[Tensor, Tensor] = _product("normal", weight, X, pieces)
    return result


def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ, contiguous, in ``dtype``: one read of W, one write of the result.

    Args:
        weight: (m, n) in float32, float16 or bfloat16, any strides.
        dtype: float32, float16 or bfloat16.

    Returns:
        (n, m) in ``dtype``, contiguous, never sharing storage with ``weight``.

    Raises:
        TypeError: a dtype other than those.
        ValueError: ``weight`` is not 2-D.
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
    """W −= s·B·A in place, accumulated in float32 and rounded once to the dtype of W.

    Args:
        weight: (out, in) in float32, float16 or bfloat16, any strides that do not overlap;
            (in, out) with ``fan_in_fan_out``, and then W −= s·(B·A)ᵀ.
        lora_B: (out, r) float32.
        lora_A: (r, in) float32.
        scaling: s.
        fan_in_fan_out: the weight is stored (in, out), as transformers' ``Conv1D`` stores it.

    Returns:
        ``weight``.

    Raises:
        TypeError: a dtype other than those.
        ValueError: shapes or devices that do not fit, or a weight whose elements share memory.
    """
    checks.check_subtraction(weight, lora_B, lora_A, fan_in_fan_out)
    with torch.no_grad():
        dispatch.bind("subtract_lowrank_", weight)(weight, lora_B, lora_A, float(scaling), fan_in_fan_out)
    return weight


def sum_of_squares(weights: Tensor) -> Tensor:
    """‖W‖_F² of each weight of a stack, in float32 along rows and in float64 across them.

    Args:
        weights: (batch, m, n) in float32, float16 or bfloat16, any strides.

    Returns:
        (batch,) float64. NaN or Inf in a weight show in it.

    Raises:
        TypeError: a dtype other than those.
        ValueError: not a stack.
    """
    checks.check_weight("sum_of_squares", weights, stack=True)
    if weights.ndim != 3:
        raise ValueError(f"sum_of_squares: weights must be a stack (batch, m, n), got shape {tuple(weights.shape)}")
    with torch.no_grad():
        result: Tensor = dispatch.bind("sum_of_squares", weights)(weights)
    return result


def gram_schmidt(panel: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One round of block Gram–Schmidt: what a panel adds to a basis, orthonormal as far as one CholeskyQR makes it.

    Args:
        panel: (batch, n, b), float32 or float64, b ≥ 1.
        basis: (batch, k, n), orthonormal rows, same dtype and device; None for an empty one.

    Returns:
        The columns of P = panel − basisᵀ·basis·panel, orthonormalised to ε·cond(P)², (batch, n, b); the smallest pivot
        of the Cholesky factor of PᵀP scaled to a unit diagonal, (batch,), 0 or NaN where the result is worthless; and
        the shortest column norm of P, (batch,).

    Raises:
        TypeError: a dtype other than those.
        ValueError: shapes, dtypes or devices that do not fit.
    """
    checks.check_orthogonalisation(panel, basis)
    with torch.no_grad():
        result: tuple[Tensor, Tensor, Tensor] = dispatch.bind("gram_schmidt", panel, panel.dtype)(panel, basis)
    return result


def _product(verb: str, weight: Tensor, panel: Tensor, pieces: int) -> Any:
    checks.check_pieces(verb, pieces)
    with torch.no_grad():
        return dispatch.bind(verb, weight, panel.dtype)(weight, panel, pieces)
