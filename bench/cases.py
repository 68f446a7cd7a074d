"""What is measured: cases, and the suites that group them.

A suite is a name and a tuple of cases; a new one is one more entry in :data:`SUITES`.
"""

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


MINILM_LINEARS = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}
SQUARE, UP, DOWN = (
    f"encoder.layer.2.{linear}.weight" for linear in ("attention.output.dense", "intermediate.dense", "output.dense")
)


def minilm(layer: int, linear: str, rank: int) -> Case:
    """A real weight of all-MiniLM-L6-v2, in the precision it is published in."""
    return Case(
        f"minilm-{layer}.{linear}",
        MINILM_LINEARS[linear],
        rank,
        dtype="fp32",
        spectrum="real",
        source=f"encoder.layer.{layer}.{linear}.weight",
    )


LLAMA = "llama2-7b"
SUITES: dict[str, tuple[Case, ...]] = {
    "init": (
        Case(LLAMA, (4096, 4096), 16),
        Case(LLAMA, (4096, 4096), 128),
        Case(LLAMA, (4096, 4096), 16, spectrum="real-like", source=SQUARE),
        minilm(2, "attention.output.dense", 16),
        minilm(2, "attention.output.dense", 64),
        minilm(2, "intermediate.dense", 16),
        minilm(2, "intermediate.dense", 64),
    ),
    "shapes": (
        minilm(2, "output.dense", 16),
        Case("gpt2-c_attn", (2304, 768), 16, spectrum="real-like", fan_in_fan_out=True, source=UP),
        Case("llama3.2-1b", (2048, 2048), 16),
        Case("llama3.2-1b", (2048, 2048), 64, spectrum="real-like", source=SQUARE),
        Case(f"{LLAMA}-gate", (11008, 4096), 16, spectrum="real-like", source=UP),
        Case(f"{LLAMA}-down", (4096, 11008), 16, spectrum="real-like", source=DOWN),
        Case(LLAMA, (4096, 4096), 16, spectrum="flat"),
    ),
    "real": tuple(minilm(layer, linear, 16) for layer in range(6) for linear in MINILM_LINEARS),
    "quick": (
        minilm(2, "attention.output.dense", 8),
        Case("small", (512, 384), 8),
        Case("small", (320, 256), 4, dtype="fp16", spectrum="real-like", fan_in_fan_out=True, source=UP),
    ),
}
