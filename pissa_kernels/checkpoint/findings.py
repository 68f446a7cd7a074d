"""What ``verify_checkpoint`` finds."""

from __future__ import annotations

from typing import NamedTuple

from .check_layer import LayerCheck
from .check_quantized import QuantizedCheck


class Finding(NamedTuple):
    """One thing that does not hold.

    Attributes:
        where: name of a tensor or file.
        what: what is wrong with it.
    """

    where: str
    what: str


class Verification(list[Finding]):
    """The findings of :func:`pissa_kernels.verify_checkpoint`, sorted: an empty list where everything holds.

    Attributes:
        layers: check of every residual in a float dtype, in the report's order.
        quantized: check of every quantized weight: the residuals in the report's order, then layers without an adapter.
        copied: number of tensors that equal the original's bit for bit.
        files: number of other files that are as they were written.
        extra: files that were not part of the result when it was written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[LayerCheck] = []
        self.quantized: list[QuantizedCheck] = []
        self.copied = 0
        self.files = 0
        self.extra: list[str] = []

    def note(self, where: str, what: str) -> None:
        """Add a finding."""
        self.append(Finding(where, what))
