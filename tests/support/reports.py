"""Reports with known spectra and energies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pissa_kernels import Certificate, LayerReport, Report

LLAMA = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip


def layer(name: str, sigma: Sequence[float] = (4.0, 2.0, 1.0), energy: float = 0.5, **changes: Any) -> LayerReport:
    """A layer with these singular values, which capture this share of its energy."""
    values = {
        "name": name,
        "shape": (64, 48),
        "rank": len(sigma),
        "certificate": Certificate(11, energy, 2e-6, True, "krylov"),
        "seconds": 0.25,
        "singular_values": torch.tensor(sigma, dtype=torch.float32),
        "dtype": torch.bfloat16,
        "scaling": 1.0,
        "init": "pissa",
        "seed": 0,
    }
    return LayerReport(**{**values, **changes})


def power_law(names: Iterable[str], rank: int = 16) -> Report:
    """Layers with σᵢ = i^−a and captured energies from 10 % to 60 %."""
    index = torch.arange(1, rank + 1, dtype=torch.float64)
    layers = []
    for number, name in enumerate(names):
        sigma = index ** -(0.3 + 0.01 * (number % 40))
        layers.append(layer(name, sigma.tolist(), 0.1 + 0.005 * (number % 101), shape=(4096, 4096)))
    return Report(layers)


def llama(depths: int, projections: Sequence[str] = tuple(LLAMA), extra: Sequence[str] = ()) -> Report:
    """The layers of a decoder, in the order of PEFT."""
    return power_law([f"model.layers.{depth}.{name}" for depth in range(depths) for name in projections] + list(extra))


def in_first_triplets(ranks: Mapping[str, int]) -> list[LayerReport]:
    """Layers of rank 8 and scaling 2 whose captured energy is in their first triplets, as many as ``ranks`` says."""
    return [layer(name, (1.0,) * rank + (0.0,) * (8 - rank), scaling=2.0) for name, rank in ranks.items()]
