"""Check that of two adapters the second is the initial one. Swapped, they give the negative of what training did."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..adapter.names import CONFIG_NAME, WEIGHTS_NAME
from ..peft import sidecar
from .adapter import read_adapter
from .lowrank import FactorPair
from .pair import AdapterPair

# Training moves factors away from principal components by more than this, against what rounding to bf16 does.
_RATIO = 8
# Deviation up to which factors are principal components: some roundings to bf16.
_PRINCIPAL = 0.02


class SwapCheck:
    """Collects the layers of a pair of adapters, one at a time, and refuses a pair that is swapped.

    PiSSA starts from A₀ = √(S/s)·Vᵀ and B₀ = U·√(S/s), so A₀·A₀ᵀ and B₀ᵀ·B₀ are the same diagonal matrix. Training
    does not keep them so.
    """

    def __init__(self) -> None:
        self._trained: list[float] = []
        self._initial: list[float] = []

    def add(self, factors: FactorPair) -> None:
        """Measure one layer. A rank of 1 has no angles to measure, and equal norms may be chance."""
        if len(factors.A) < 2:
            return
        self._trained.append(deviation(factors.A, factors.B))
        self._initial.append(deviation(factors.A0, factors.B0))

    def finish(self, pair: AdapterPair, *, untrained: bool) -> None:
        """Refuse a swapped pair.

        Args:
            pair: the adapters, after all their layers were added.
            untrained: whether both have the same factors.

        Raises:
            ValueError: the first adapter is an initial one, and the second is a trained one.
        """
        trained, initial = (math.hypot(*_finite(values)) for values in (self._trained, self._initial))
        principal = trained <= _PRINCIPAL * math.sqrt(len(self._trained))
        if (principal and self._trained and _RATIO * trained < initial) or (untrained and _beside_trained(pair)):
            raise ValueError(
                f"the adapters are swapped: {pair.trained.path.parent} has the factors that PiSSA starts from, and "
                f"{pair.initial.path.parent} has trained ones; give the trained adapter first, then the initial one"
            )


def deviation(A: Tensor, B: Tensor) -> float:
    """Distance of A·Aᵀ and Bᵀ·B from their common diagonal, relative to their norm; NaN for factors of zeros."""
    A, B = A.double(), B.double()
    grams = [A @ A.mT, B.mT @ B]
    diagonal = torch.diag(torch.stack([gram.diagonal() for gram in grams]).mean(dim=0))
    return float(torch.stack([gram - diagonal for gram in grams]).norm() / torch.stack(grams).norm())


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _beside_trained(pair: AdapterPair) -> bool:
    """Whether the initial factors lie beside a trained adapter, and the other adapter is elsewhere."""
    folder = pair.initial.path.parent
    if pair.initial.path.name != sidecar.INITIAL_NAME or folder.resolve() == pair.trained.path.parent.resolve():
        return False
    if not all((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME)):
        return False
    beside = read_adapter(folder)
    with beside.path.open("rb") as file:
        both = AdapterPair(beside, pair.initial, file.fileno(), pair.initial_descriptor)
        return any(not both.read(name).untrained() for name in beside.layers)
