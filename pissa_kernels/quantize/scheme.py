"""What a quantized format has to offer. One file for each package implements it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Packed(Protocol):
    """A quantized weight (m, n).

    Attributes:
        shape: (m, n).
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    def dequantize(self) -> Tensor:
        """The values (m, n) that a layer computes with, in memory of their own and the dtype that it takes them in."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores, by what follows the module's name and a dot, such as "weight.absmax"."""


class Scheme(Protocol):
    """A format with its settings. Equal settings give equal objects.

    Attributes:
        name: the format and its settings for reports, such as "nf4, blocks of 64, double quantization".
    """

    @property
    def name(self) -> str: ...

    def quantize(self, weight: Tensor, dtype: torch.dtype) -> Packed:
        """Quantize a weight.

        Args:
            weight: (m, n) float32, contiguous, finite.
            dtype: dtype of the model, which a layer dequantizes to if its format says so.

        Raises:
            ValueError: the format cannot hold a weight of this shape or these values.
        """

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each of :meth:`Packed.tensors` for a weight (m, n), before it is quantized."""

    def unpack(self, tensors: Mapping[str, Tensor]) -> Packed:
        """The quantized weight that :meth:`Packed.tensors` describes, as a checkpoint holds it.

        Raises:
            ValueError: the tensors do not belong together.
        """
