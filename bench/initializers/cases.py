"""One weight to measure on; :mod:`.suites` groups them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..harness.dtypes import DTYPES
from .spectra import minilm_weight, synthetic_weight


@dataclass(frozen=True)
class Case:
    """One weight and the rank of its adapter.

    Attributes:
        model: model that the shape is taken from.
        shape: (out, in), as the adapter sees it.
        rank: r.
        dtype: dtype of the weight: "bf16", "fp16" or "fp32".
        spectrum: "real", or one of the spectra in :mod:`.spectra`.
        fan_in_fan_out: whether the weight is stored (in, out), in a transformers ``Conv1D``.
        source: name of the MiniLM tensor that is the weight ("real") or has the spectrum ("real-like"); otherwise "".
        seed: seed of a synthetic weight.
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
        """The weight as its layer stores it, contiguous; built on the CPU, so that it is the same on every device."""
        if self.spectrum == "real":
            weight = minilm_weight(self.source)
            if tuple(weight.shape) != self.shape:
                raise ValueError(f"{self.source} has shape {tuple(weight.shape)}, the case has {self.shape}")
        else:
            weight = synthetic_weight(self.shape, self.spectrum, source=self.source, seed=self.seed)
        stored = weight.mT if self.fan_in_fan_out else weight
        return stored.to(DTYPES[self.dtype]).contiguous().to(device)
