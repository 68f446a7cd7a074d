"""The arguments of ``patch_peft`` that a later patch of the same model is made with."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..quantize.iteration import DEFAULT_ITERATIONS, Iterations
from .layers.originals import open_originals
from .layers.quantized_layer import Quantizing


class QuantizedSettings(NamedTuple):
    """The arguments of :func:`pissa_kernels.patch_peft` for quantized layers."""

    original: str | os.PathLike[str] | None = None
    iterations: Iterations = DEFAULT_ITERATIONS
    nuclear: bool = False

    def open(self) -> Quantizing:
        """The settings with the source of the weights."""
        originals = None if self.original is None else open_originals(self.original)
        return Quantizing(originals, self.iterations, self.nuclear)


NOT_QUANTIZED = QuantizedSettings()
