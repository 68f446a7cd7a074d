"""Check that of two adapters the second is the initial one of the first.

Swapped, they give the negative of what training did; with another trained adapter, or that of another model, the
result is not what training did either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..adapter.names import ADAPTER_FOLDER, CONFIG_NAME, WEIGHTS_NAME
from ..peft.saving import sidecar
from .adapter import read_adapter
from .lowrank import FactorPair
from .pair import AdapterPair

# Training moves factors away from principal components by more than this, against what rounding to bf16 does.
_RATIO = 8
# Deviation up to which factors are principal components: some roundings to bf16.
_PRINCIPAL = 0.02
# The same of factors in float32 that are not numbers of bf16 or fp16.
_PRINCIPAL_FLOAT32 = 1e-3
# Cosine of B·A and B₀·A₀ that training leaves in one layer at least. That of unrelated products is about 1/√(in·out),
# so that smaller layers tell nothing.
_RELATED, _MEASURED = 0.1, 1024
# Initializers of PEFT from which B₀·A₀ is no product of principal components, in the initial adapter's config.
_OTHERS = ("olora", "corda", "eva", "loftq", "orthogonal", "gaussian")


class SwapCheck:
    """Collects the layers of a pair of adapters, one at a time, and refuses a pair that is swapped.

    PiSSA starts from A₀ = √(S/s)·Vᵀ and B₀ = U·√(S/s), so A₀·A₀ᵀ and B₀ᵀ·B₀ are the same diagonal matrix. Training
    does not keep them so.
    """

    def __init__(self) -> None:
        self._trained: list[float] = []
        self._initial: list[float] = []
        self._excess: list[float] = []
        self._cosines: list[float] = []

    def add(self, factors: FactorPair) -> None:
        """Measure the matrices of one layer."""
        for matrix in factors.matrices():
            self._add(matrix)

    def _add(self, factors: FactorPair) -> None:
        """Measure one matrix. A rank of 1 has no angles to measure, and equal norms may be chance."""
        related = cosine(factors)
        if len(factors.B) * factors.A.shape[1] >= _MEASURED:
            self._cosines.append(related)
        if len(factors.A) < 2:
            return
        self._trained.append(deviation(factors.A, factors.B))
        self._initial.append(deviation(factors.A0, factors.B0))
        if math.isfinite(related):  # plain LoRA starts from B₀ = 0
            self._excess.append(self._initial[-1] / _accuracy(factors.A0, factors.B0))

    def finish(self, pair: AdapterPair, *, untrained: bool) -> None:
        """Refuse a swapped pair, and one whose second adapter is not the initial one.

        Args:
            pair: the adapters, after all their layers were added.
            untrained: whether both have the same factors.

        Raises:
            ValueError: the first adapter is an initial one and the second a trained one, both are trained, or they are
                of different models.
        """
        trained, initial = _finite(self._trained), _finite(self._initial)
        first, second = math.hypot(*trained), math.hypot(*initial)
        principal = trained and first <= _PRINCIPAL * math.sqrt(len(trained))
        if (principal and _RATIO * first < second) or (untrained and _beside_trained(pair)):
            raise ValueError(
                f"the adapters are swapped: {pair.trained.path.parent} has the factors that PiSSA starts from, and "
                f"{pair.initial.path.parent} has trained ones; give the trained adapter first, then the initial one"
            )
        path = pair.initial.path
        if path.samefile(pair.trained.path) and path.resolve().parent.name != ADAPTER_FOLDER:
            raise ValueError(
                f"{pair.initial.path} is given as the trained and as the initial adapter; give the initial adapter, "
                "which init writes into pissa_init/"
            )
        kind, cosines = pair.initial.config.get("init_lora_weights"), _finite(self._cosines)
        if math.hypot(*self._excess) > math.sqrt(len(self._excess)) and kind not in _OTHERS:
            raise ValueError(
                f"{pair.initial.path} does not have the factors that PiSSA starts from, but trained ones; give the "
                "initial adapter, which init writes into pissa_init/"
            )
        if cosines and max(cosines) < _RELATED:
            raise ValueError(
                f"{pair.trained.path} was not trained from {pair.initial.path}: their products B·A have nothing in "
                "common in any layer; give the initial adapter of the residual model that it was trained on"
            )


def deviation(A: Tensor, B: Tensor) -> float:
    """Distance of A·Aᵀ and Bᵀ·B from their common diagonal, relative to their norm; NaN for factors of zeros."""
    A, B = A.double(), B.double()
    grams = [A @ A.mT, B.mT @ B]
    diagonal = torch.diag(torch.stack([gram.diagonal() for gram in grams]).mean(dim=0))
    return float(torch.stack([gram - diagonal for gram in grams]).norm() / torch.stack(grams).norm())


def _accuracy(*factors: Tensor) -> float:
    """Deviation up to which factors are principal components, by the dtype that they were rounded to."""
    rounded = any(
        all(bool((factor.to(dtype).to(factor.dtype) == factor).all()) for factor in factors)
        for dtype in (torch.bfloat16, torch.float16)
    )
    return _PRINCIPAL if rounded else _PRINCIPAL_FLOAT32


def cosine(factors: FactorPair) -> float:
    """Cosine of the angle between B·A and B₀·A₀ as vectors; NaN if one of them is 0."""
    A, B, A0, B0 = (factor.double() for factor in (factors.A, factors.B, factors.A0, factors.B0))
    both, own, other = (
        float(((left.mT @ right) * (above @ below.mT)).sum())
        for left, right, above, below in ((B, B0, A, A0), (B, B, A, A), (B0, B0, A0, A0))
    )
    return both / math.sqrt(own * other) if own * other > 0 else math.nan


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _beside_trained(pair: AdapterPair) -> bool:
    """Whether the initial factors lie beside a trained adapter, and the other adapter is elsewhere."""
    folder = pair.initial.path.parent
    if pair.initial.path.name != sidecar.INITIAL_NAME or folder.resolve() == pair.trained.path.parent.resolve():
        return False
    if not all((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME)):
        return False
    beside = read_adapter(folder, pair.initial.known)
    with beside.path.open("rb") as file:
        both = AdapterPair(beside, pair.initial, file.fileno(), pair.initial_descriptor)
        return any(not both.read(name).untrained() for name in beside.layers)
