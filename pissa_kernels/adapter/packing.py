"""The matrices of a layer's factors: PEFT stores those of fused experts, and of a convolution's groups, in one A and B.

A layer that multiplies with one matrix has A (r, in) and B (out, r). Fused experts have them packed
(:mod:`pissa_kernels.adapter.stacks`). A convolution with g groups has A (r, in, *kernel) and B (out, r/g, 1, …), whose
rows are those of the groups one after another. Each row of A sees the inputs of all groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .stacks import packed, unpacked


@dataclass(frozen=True)
class Packing:
    """How the A and B of one layer hold the factors of its matrices.

    Attributes:
        experts: E of fused experts; 1 for other layers.
        groups: g of a convolution; 1 for other layers.
        kernel: size of a convolution's kernel; empty for other layers.

    Examples:
        >>> import torch
        >>> from pissa_kernels.adapter.packing import Packing
        >>> A, B = Packing(experts=8).split(torch.zeros(32, 16), torch.zeros(24, 32))
        >>> A.shape, B.shape
        (torch.Size([8, 4, 16]), torch.Size([8, 24, 4]))
    """

    experts: int = 1
    groups: int = 1
    kernel: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        """Number p of matrices."""
        return self.experts * self.groups

    def shapes(self, rank: int, shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B as PEFT stores them.

        Args:
            rank: r of PEFT's config: that of every expert, and of all groups together.
            shape: (out, in) of each matrix.
        """
        out, width = shape
        if self.kernel:
            inputs = width // math.prod(self.kernel)
            ones = (1,) * len(self.kernel)
            return (rank, inputs, *self.kernel), (out * self.groups, rank // self.groups, *ones)
        return (self.experts * rank, width), (out, rank * self.experts)

    def split(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of each matrix, as views where A and B are contiguous.

        Args:
            A, B: as PEFT stores them.

        Returns:
            (p, r, in) and (p, out, r), with r/g for r in a convolution, and in·k for in.
        """
        if self.kernel:
            A, B = A.flatten(1), B.flatten(1)
            return A.reshape(self.groups, -1, A.shape[1]), B.reshape(self.groups, -1, B.shape[1])
        return unpacked(A, B, self.experts)

    def join(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`split`, contiguous."""
        if not self.kernel:
            return packed(A, B)
        stored = self.shapes(A.shape[0] * A.shape[1], (B.shape[1], A.shape[2]))
        return A.reshape(stored[0]).contiguous(), B.reshape(stored[1]).contiguous()


def packing_of(A: Sequence[int], B: Sequence[int], experts: int = 1) -> Packing:
    """The packing of a layer, from the shapes of its A and B as PEFT stores them.

    Args:
        A, B: the shapes.
        experts: E, which the shapes do not tell.

    Raises:
        ValueError: they are no shapes of two factors; the message has what was found and what is accepted.
    """
    if len(A) == len(B) == 2:
        if A[0] != B[1] or A[0] % experts:
            raise ValueError(
                f"lora_A has shape {tuple(A)} and lora_B {tuple(B)}; accepted are ({experts}·r, in) and "
                f"(out, r·{experts})"
            )
        return Packing(experts=experts)
    ones = all(size == 1 for size in B[2:])
    if not (3 <= len(A) == len(B) <= 5 and ones and B[1] and A[0] % B[1] == 0 and B[0] % (A[0] // B[1]) == 0):
        raise ValueError(
            f"lora_A has shape {tuple(A)} and lora_B {tuple(B)}; accepted are (r, in) and (out, r), and of a "
            "convolution (r, in, *kernel) and (out, r/groups, 1, …)"
        )
    return Packing(groups=A[0] // B[1], kernel=tuple(A[2:]))
