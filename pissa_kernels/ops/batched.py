"""Batches of weights of one shape and of panels, as the operations of the GPU engine take them.

The operations are those that :mod:`pissa_kernels.svd.fixed` is made of. The weights stay where they are: a batch is a
list of tensors and a table of their addresses. Panels are stacked. Nothing is transferred to the host, and no result
depends on the other members of its batch: a kernel's tiles and the order of its sums depend on the shape alone. The
bodies are Triton's (:mod:`.triton.batched`) and plain torch's (:mod:`.batched_reference`), with the same signatures;
:func:`.dispatch.bodies` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of equal shape, dtype and strides on one device.

    Attributes:
        tensors: (m, n) each, float32, float16 or bfloat16.
        addresses: (batch,) int64 on their device.
    """

    tensors: tuple[Tensor, ...]
    addresses: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Weights:
        """The batch of ``tensors``; one copy of their addresses to the device, which does not block."""
        table = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device="cpu")
        if tensors[0].is_cuda:
            table = table.pin_memory()
        return cls(tuple(tensors), table.to(tensors[0].device, non_blocking=True))

    @property
    def mT(self) -> Weights:
        """The transposed weights, as views."""
        return Weights(tuple(tensor.mT for tensor in self.tensors), self.addresses)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, m, n)."""
        m, n = self.tensors[0].shape
        return len(self.tensors), m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


class Panel(NamedTuple):
    """A batch of panels, as products read them.

    Attributes:
        values: (batch, n, k) float32, contiguous; None where only the pieces are needed.
        pieces: (p, batch, n, k) bfloat16, contiguous: the values are the sum of the pieces, up to the next piece. The
            largest piece comes first, and the first two of three are what a split in two gives. None where a product
            splits the values itself. A batch dimension of stride 0 is allowed.
    """

    values: Tensor | None
    pieces: Tensor | None

    @property
    def full(self) -> Tensor:
        """The values of a panel that has them."""
        assert self.values is not None
        return self.values

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, n, k)."""
        values = self.pieces if self.values is None else self.values
        assert values is not None
        batch, n, k = values.shape[-3:]
        return batch, n, k

    @property
    def mT(self) -> Panel:
        """The transposed panels, as views."""
        return Panel(*(None if numbers is None else numbers.mT for numbers in self))

    def part(self, members: Sequence[int]) -> Panel:
        """The panels of some members of the batch."""
        values = None if self.values is None else torch.stack([self.values[member] for member in members])
        pieces = None if self.pieces is None else torch.stack([self.pieces[:, member] for member in members], dim=1)
        return Panel(values, pieces)


class Update(NamedTuple):
    """What a product adds up before it is stored: α·(left·right) + β·current + γ·previous.

    Attributes:
        alpha: (batch,) float32.
        beta: β.
        current: (batch, rows, k) float32; None for β = 0.
        gamma: γ.
        previous: (batch, rows, k) float32; None for γ = 0.
    """

    alpha: Tensor
    beta: float = 0.0
    current: Tensor | None = None
    gamma: float = 0.0
    previous: Tensor | None = None
