"""One weight to measure on; :mod:`bench.suites` groups them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .spectra import minilm_weight, synthetic_weight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One weight and the rank of its adapter.

    Attributes:
        model: where the shape comes from.
        shape: (out, in), as the adapter sees it.
        rank: r.
        dtype: of the weight, "bf16", "fp16" or "fp32".
        spectrum: "real", or one that :mod:`bench.spectra` documents.
        fan_in_fan_out: the weight is stored (in, out) in a transformers ``Conv1D``.
        source: the MiniLM tensor that is the weight ("real") or lends its spectrum ("real-like").
        seed: of a synthetic weight.
    """

    model: str
    shape: tuple[int, int]
    rank: int
    dtype: str = "bf16"
    spectrum: str = "mix"
    fan_in_fan_out: bool = False
    source: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        layout = "-conv1d" if self.fan_in_fan_out else ""
        return f"{self.model}-{self.shape[0]}x{self.shape[1]}{layout}-{self.spectrum}-r{self.rank}-{self.dtype}"

    def weight(self, device: str = "cpu") -> Tensor:
        """The weight as its layer stores it, contiguous; built on the CPU, so that every device gets the same one."""
        if self.spectrum == "real":
            weight = minilm_weight(self.source)
            if tuple(weight.shape) != self.shape:
                raise ValueError(f"{self.source} has shape {tuple(weight.shape)}, the case says {self.shape}")
        else:
            weight = synthetic_weight(self.shape, self.spectrum, source=self.source, seed=self.seed)
        stored = weight.mT if self.fan_in_fan_out else weight
        return stored.to(DTYPES[self.dtype]).contiguous().to(device)
