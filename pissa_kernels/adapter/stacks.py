"""How PEFT packs the factors of a stack of matrices, such as the fused experts of one layer, into one A and one B.

A stack of E matrices (out, in) with an adapter of rank r has A (E·r, in), in which row e·r + k is row k of expert e,
and B (out, r·E), in which column k·E + e is column k of expert e.
"""

from __future__ import annotations

from torch import Tensor


def packed(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a stack as PEFT stores them.

    Args:
        A: (E, r, in).
        B: (E, out, r).

    Returns:
        (E·r, in) and (out, r·E), contiguous.

    Examples:
        >>> import torch
        >>> from pissa_kernels.adapter.stacks import packed
        >>> A, B = packed(torch.zeros(8, 4, 32), torch.zeros(8, 64, 4))
        >>> A.shape, B.shape
        (torch.Size([32, 32]), torch.Size([64, 32]))
    """
    experts, rank, _ = A.shape
    return A.reshape(experts * rank, -1).contiguous(), B.permute(1, 2, 0).reshape(-1, rank * experts).contiguous()


def unpacked(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The factors of each matrix of a stack, as views of what PEFT stores where that is contiguous.

    Args:
        A: (E·r, in).
        B: (out, r·E).
        experts: E.

    Returns:
        (E, r, in) and (E, out, r).
    """
    return A.reshape(experts, -1, A.shape[-1]), B.reshape(len(B), -1, experts).permute(2, 0, 1)
