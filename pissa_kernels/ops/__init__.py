"""The verbs: everything that this package does with a whole weight, under one name each.

Shapes are checked here, so that the bodies hold only maths. A verb runs on the first backend of
:data:`BACKENDS` that has it; plain torch has all of them on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

__all__ = ["backend", "matmul", "normal", "rmatmul", "subtract_lowrank_", "transpose_cast"]

VERBS = ("matmul", "rmatmul", "normal", "transpose_cast", "subtract_lowrank_")
# These take a stack of weights (batch, m, n) too, with a stack of panels.
STACK_VERBS = ("matmul", "rmatmul", "normal")
BACKENDS = {"torch": reference}
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def backend(verb: str, weight: Tensor) -> str:
    """Name of the backend that ``verb`` would run on for ``weight``.

    Raises:
        ValueError: ``verb`` is not one of :data:`VERBS`.
    """
    if verb not in VERBS:
        raise ValueError(f"verb must be one of {', '.join(VERBS)}, got {verb!r}")
    _check_weight(verb, weight, stack=verb in STACK_VERBS)
    return next(iter(BACKENDS))


def matmul(weight: Tensor, X: Tensor) -> Tensor:
    """W·X without a float32 copy of W.

    Args:
        weight: (m, n), or (batch, m, n), in float32, float16 or bfloat16, any strides.
        X: (n, k), or (batch, n, k), in float32, or float64 for a product in double precision; same device.

    Returns:
        (m, k), or (batch, m, k), in the dtype of ``X``, contiguous.

    Raises:
        TypeError: a dtype other than those.
        ValueError: shapes or devices that do not fit.
    """
    _check_panel("matmul", weight, X, axis=-1)
    return reference.matmul(weight, X)


def rmatmul(weight: Tensor, Y: Tensor) -> Tensor:
    """Wᵀ·Y without a copy or a transpose of W.

    Args:
        weight: (m, n), or (batch, m, n), in float32, float16 or bfloat16, any strides.
        Y: (m, k), or (batch, m, k), in float32, or float64 for a product in double precision; same device.

    Returns:
        (n, k), or (batch, n, k), in the dtype of ``Y``, contiguous.

    Raises:
        TypeError: a dtype other than those.
        ValueError: shapes or devices that do not fit.
    """
    _check_panel("rmatmul", weight, Y, axis=-2)
    return reference.rmatmul(weight, Y)


def normal(weight: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Y = W·X and Z = Wᵀ·Y, from one read of W where its rows are contiguous.

    Args:
        weight: (m, n), or (batch, m, n), in float32, float16 or bfloat16, any strides.
        X: (n, k), or (batch, n, k), in float32, or float64 for products in double precision; same device.

    Returns:
        Y (m, k) and Z (n, k), or stacks of these, in the dtype of ``X``, contiguous.

    Raises:
        TypeError: a dtype other than those.
        ValueError: shapes or devices that do not fit.
    """
    _check_panel("normal", weight, X, axis=-1)
    return reference.normal(weight, X)


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
    _check_weight("transpose_cast", weight)
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"transpose_cast: dtype must be float32, float16 or bfloat16, got {dtype}")
    return reference.transpose_cast(weight, dtype)


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
    _check_weight("subtract_lowrank_", weight)
    if lora_A.dtype != torch.float32 or lora_B.dtype != torch.float32:
        raise TypeError(f"subtract_lowrank_: A and B must be float32, got {lora_A.dtype} and {lora_B.dtype}")
    out_features, in_features = weight.mT.shape if fan_in_fan_out else weight.shape
    rank = lora_A.shape[0] if lora_A.ndim else 0
    if tuple(lora_B.shape) != (out_features, rank) or tuple(lora_A.shape) != (rank, in_features):
        raise ValueError(
            f"subtract_lowrank_: weight {tuple(weight.shape)} with fan_in_fan_out={fan_in_fan_out} takes "
            f"B ({out_features}, r) and A (r, {in_features}), got B {tuple(lora_B.shape)} and A {tuple(lora_A.shape)}"
        )
    if not weight.device == lora_A.device == lora_B.device:
        raise ValueError(
            f"subtract_lowrank_: weight, B and A are on {weight.device}, {lora_B.device} and {lora_A.device}"
        )
    if has_overlap(weight):
        raise ValueError(
            f"subtract_lowrank_: elements of the weight share memory (strides {weight.stride()}); clone it first"
        )
    return reference.subtract_lowrank_(weight, lora_B, lora_A, float(scaling), fan_in_fan_out)


def has_overlap(weight: Tensor) -> bool:
    """Whether two elements of a 2-D ``weight`` may live at one address, as in an expanded tensor."""
    (major, rows), (minor, cols) = sorted(zip(weight.stride(), weight.shape, strict=True), reverse=True)
    if rows == 0 or cols == 0:
        return False
    return (cols > 1 and minor == 0) or (rows > 1 and major <= (cols - 1) * minor)


def _check_weight(verb: str, weight: Tensor, stack: bool = False) -> None:
    if weight.ndim != 2 and not (stack and weight.ndim == 3):
        accepted = "2-D, or 3-D for a stack" if stack else "2-D"
        raise ValueError(f"{verb}: weight must be {accepted}, got shape {tuple(weight.shape)}")
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{verb}: weight must be float32, float16 or bfloat16, got {weight.dtype}")


def _check_panel(verb: str, weight: Tensor, panel: Tensor, axis: int) -> None:
    """``axis`` of the weight is the one that the panel's rows are multiplied along."""
    _check_weight(verb, weight, stack=True)
    if panel.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{verb}: the panel must be float32 or float64, got {panel.dtype}")
    leading = (*weight.shape[:-2], weight.shape[axis])
    if panel.ndim != weight.ndim or panel.shape[:-1] != leading:
        raise ValueError(
            f"{verb}: weight {tuple(weight.shape)} takes a panel ({', '.join(map(str, leading))}, k), "
            f"got {tuple(panel.shape)}"
        )
    if weight.device != panel.device:
        raise ValueError(f"{verb}: weight is on {weight.device}, the panel on {panel.device}")
