"""Checks of the verbs' arguments, with one error message each, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

VERBS = (
    "matmul",
    "rmatmul",
    "normal",
    "transpose_cast",
    "subtract_lowrank_",
    "sum_of_squares",
    "gram",
    "orthonormalize",
    "chebyshev_filter",
    "ritz",
    "triplets",
)
# Verbs that also take a batch of weights (batch, m, n), with a batch of panels.
STACK_VERBS = ("matmul", "rmatmul", "normal", "sum_of_squares")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def has_overlap(weight: Tensor) -> bool:
    """Whether two elements of a weight may share memory, as in an expanded tensor.

    Args:
        weight: of any shape and dtype. Its strides are looked at, not its elements.

    Examples:
        >>> import torch
        >>> from pissa_kernels import ops
        >>> weight = torch.ones(64, 48)
        >>> ops.has_overlap(weight.mT), ops.has_overlap(weight[:1].expand(64, 48))
        (False, True)
    """
    if not weight.numel():
        return False
    last = 0  # place of the last element of the dimensions with smaller strides
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size > 1 and stride <= last:
            return True
        last += (size - 1) * stride
    return False


def check_verb(verb: str, weight: Tensor) -> None:
    if verb not in VERBS:
        raise ValueError(f"verb must be one of {', '.join(VERBS)}, got {verb!r}")
    check_weight(verb, weight, stack=verb in STACK_VERBS)


def check_pieces(verb: str, pieces: int) -> None:
    if pieces not in (1, 2, 3):
        raise ValueError(f"{verb}: pieces must be 1, 2 or 3, got {pieces!r}")


def check_weight(verb: str, weight: Tensor, stack: bool = False) -> None:
    if weight.ndim != 2 and not (stack and weight.ndim == 3):
        accepted = "2-D, or 3-D for a batch" if stack else "2-D"
        raise ValueError(f"{verb}: weight must be {accepted}, got shape {tuple(weight.shape)}")
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{verb}: weight must be float32, float16 or bfloat16, got {weight.dtype}")


def check_panel(verb: str, weight: Tensor, panel: Tensor, axis: int) -> None:
    """Check a product's panel, whose rows are multiplied along ``axis`` of the weight."""
    check_weight(verb, weight, stack=True)
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


def check_orthonormalization(panel: Tensor, basis: Tensor | None, near: int) -> None:
    if panel.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"orthonormalize: the panel must be float32 or float64, got {panel.dtype}")
    if panel.ndim != 2 or not panel.numel():
        raise ValueError(f"orthonormalize: panel must be (n, b), n and b ≥ 1, got shape {tuple(panel.shape)}")
    if basis is None:
        return
    n, _ = panel.shape
    if basis.ndim != 2 or basis.shape[1] != n:
        raise ValueError(f"orthonormalize: panel {tuple(panel.shape)} takes a basis (k, {n}), got {tuple(basis.shape)}")
    if (basis.dtype, basis.device) != (panel.dtype, panel.device):
        raise ValueError(
            f"orthonormalize: panel is {panel.dtype} on {panel.device}, the basis {basis.dtype} on {basis.device}"
        )
    if not 0 <= near <= len(basis):
        raise ValueError(f"orthonormalize: near must be a row of the basis, 0 to {len(basis)}, got {near!r}")


def check_subtraction(weight: Tensor, lora_B: Tensor, lora_A: Tensor, fan_in_fan_out: bool) -> None:
    check_weight("subtract_lowrank_", weight)
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
