"""The matrices of a layer's factors: PEFT stores those of fused experts, and of a convolution's groups, in one A and B.

A layer that multiplies with one matrix has A (r, in) and B (out, r). Fused experts have them packed
(:mod:`pissa_kernels.adapter.stacks`). A convolution with g groups has A (r, in, *kernel) and B (out, r/g, 1, …), whose
rows are those of the groups one after another. Each row of A sees the inputs of all groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .names import module_name
from .stacks import packed, unpacked

_A, _B = ".lora_A.weight", ".lora_B.weight"


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


def stacked(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Factors of rank 2r whose product is B·A − B₀·A₀ in every matrix of a layer.

    Args:
        A, B, A0, B0: the two pairs as PEFT stores them, of one dtype.
        packing: how they are packed.

    Returns:
        A and B as PEFT stores them at rank 2r.
    """
    (A, B), (A0, B0) = packing.split(A, B), packing.split(A0, B0)
    return packing.join(torch.cat([A, A0], dim=1), torch.cat([B, -B0], dim=2))


def restacked(A: Tensor, B: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """What :func:`stacked` makes, from PEFT's ``path_initial_model_for_weight_conversion``.

    PEFT 0.21 concatenates [A; A₀] and [B, −B₀] as they are stored. For layers with one matrix, and for convolutions
    without groups, that is a LoRA of rank 2r. Otherwise the rows and columns of the two halves have to be interleaved
    by expert or by group; the numbers are all there.

    Args:
        A, B: tensors that PEFT wrote.
        packing: how the factors of the adapter are packed.

    Raises:
        ValueError: A or B does not have two halves of such a packing.

    Examples:
        >>> import torch
        >>> from pissa_kernels.adapter.packing import Packing, restacked, stacked
        >>> A, A0, B, B0 = torch.randn(8, 6), torch.randn(8, 6), torch.randn(5, 8), torch.randn(5, 8)
        >>> written = torch.cat([A, A0], dim=0), torch.cat([B, -B0], dim=1)
        >>> found, wanted = restacked(*written, Packing(experts=4)), stacked(A, B, A0, B0, Packing(experts=4))
        >>> [torch.equal(*pair) for pair in zip(found, wanted)]
        [True, True]
    """
    columns = B.shape[1] * packing.groups
    if A.shape[0] != columns or columns % (2 * packing.parts):
        raise ValueError(
            f"lora_A has shape {tuple(A.shape)} and lora_B {tuple(B.shape)}; accepted are two adapters that were "
            f"concatenated, with {packing.parts} matrices each"
        )
    (A, A0), (B, B0) = A.chunk(2), B.chunk(2, dim=1)
    return stacked(A, B, A0, -B0, packing)


def restack_file(tensors: MutableMapping[str, Tensor], experts: Mapping[str, int]) -> None:
    """:func:`restacked` of every layer in a file that PEFT wrote with ``path_initial_model_for_weight_conversion``.

    Args:
        tensors: the tensors by key, of which those of experts and of convolutions with groups are replaced.
        experts: E of each parameter that PEFT wraps, by the wrapper's key without ".lora_A.weight".

    Raises:
        ValueError: the factors of a layer are not two adapters that were concatenated; the message names it.
    """
    for key in [key for key in tensors if key.endswith(_A)]:
        module = key.removesuffix(_A)
        A, B = tensors[key], tensors[module + _B]
        try:
            packing = packing_of(A.shape, B.shape, experts.get(module, 1))
            if packing.parts > 1:
                tensors[key], tensors[module + _B] = restacked(A, B, packing)
        except ValueError as error:
            raise ValueError(f"layer {module_name(module)!r}: {error}") from None
