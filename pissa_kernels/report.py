"""What an initialisation did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .svd import Certificate


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name: the module's name in the model, or its class where the model is not known.
        shape: (out, in) of the weight as the adapter sees it.
        rank: r.
        certificate: of the SVD.
        seconds: wall time of checking, decomposing and writing back; of a layer in a wave, its share of the wave.
        singular_values: (r,) float32 on the CPU, descending; the scaling is not applied.
        dtype: of the weight.
        scaling: s, the adapter's.
        init: "pissa" or "pissa_niter_N".
        seed: of the sketch.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    certificate: Certificate
    seconds: float
    singular_values: Tensor
    dtype: torch.dtype
    scaling: float
    init: str
    seed: int
