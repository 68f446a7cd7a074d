"""A small network, and what it computes with LoRA adapters, in float64 and without PEFT or the package."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LAYERS = ("first", "middle", "last")
WIDTHS = (14, 18, 12, 10)


class Network(nn.Module):
    """Two linear layers around a ``Conv1D``, which stores its weight (in, out).

    Args:
        seed: of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        inputs, one, two, outputs = WIDTHS
        self.first = nn.Linear(inputs, one)
        self.middle = Conv1D(two, one)  # type: ignore[no-untyped-call]
        self.last = nn.Linear(two, outputs, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, trace: dict[str, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """The output (samples, 10) for inputs (samples, 14). ``trace`` gets the input and the output of each layer."""
        for name in LAYERS:
            y: Tensor = getattr(self, name)(x)
            if trace is not None:
                trace[name] = (x, y)
            x = y if name == LAYERS[-1] else torch.tanh(y)
        return x


@dataclass
class Adapter:
    """One LoRA adapter of one layer, in float64.

    Attributes:
        product: B·A (out, in).
        start: A₀ and B₀ of PiSSA; None for another LoRA.
        magnitude: (out,) of DoRA; None without it.
    """

    product: Tensor
    start: tuple[Tensor, Tensor] | None = None
    magnitude: Tensor | None = None

    @property
    def initial(self) -> Tensor:
        """B₀·A₀, or zeros."""
        return torch.zeros_like(self.product) if self.start is None else self.start[1] @ self.start[0]

    def change(self, scaling: float) -> Tensor:
        """ΔW = s·(B·A − B₀·A₀)."""
        return scaling * (self.product - self.initial)

    def size(self, scaling: float) -> float:
        """Bound of the terms that make ΔW. Their rounding errors are relative to it, not to ΔW."""
        return 2 * abs(scaling) * float(self.product.norm() + self.initial.norm())


@dataclass
class ReferenceLayer:
    """A layer before PiSSA, and its adapters.

    Attributes:
        weight: W (out, in) in float64.
        bias: (out,) in float64, or None.
        adapters: by name.
        merged: name, adapter and scaling of each merged adapter as they were when it was merged.
        tampered: what other code has added to the weight since the adapters were made, or 0.
        size: the largest norm that the terms of the computed weight have had. An error once made stays in the weight.
    """

    weight: Tensor
    bias: Tensor | None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    merged: list[tuple[str, Adapter, float]] = field(default_factory=list)
    tampered: Tensor | float = 0.0
    size: float = 0.0

    @classmethod
    def of(cls, layer: nn.Module) -> ReferenceLayer:
        """The reference of a layer that has no adapter."""
        weight: Tensor = layer.weight.detach().double()  # type: ignore[operator, union-attr]
        bias = None if layer.bias is None else layer.bias.detach().double().clone()  # type: ignore[operator, union-attr]
        return cls(weight.mT.clone() if isinstance(layer, Conv1D) else weight.clone(), bias)

    def adapted(self, terms: Iterable[tuple[Adapter, float]]) -> Tensor:
        """The weight that adapters and their scalings make of W: W + Σ ΔW, and for DoRA m·(W + ΔW)/‖W + ΔW‖.

        DoRA scales the rows of what the layer computes with the adapters before it, as PEFT combines them.
        """
        total, size, factors = self.weight, float(self.weight.norm()), 1.0
        for adapter, scaling in terms:
            change = adapter.change(scaling)
            total, size = total + change, size + adapter.size(scaling)
            if adapter.magnitude is not None:
                factor = adapter.magnitude / (self.weight + change).norm(dim=1)
                total = factor[:, None] * total
                factors *= float(torch.maximum(factor.abs(), 1 / factor.abs()).max())
        self.size = max(self.size, size * factors)
        return total

    def allowed(self, roundings: int, unit: float) -> float:
        """Norm by which the weight that the layer computes with may differ from the reference.

        An operation on a model rounds a stored tensor at most four times, and so does a forward pass its sum. Each
        rounding is an error of at most one unit roundoff of the largest term.
        """
        return 4 * (2 + roundings) * unit * self.size

    def compute(self, weight: Tensor, x: Tensor) -> Tensor:
        """The output for inputs (samples, in) with some weight, in float64."""
        y = x.double() @ weight.mT
        return y if self.bias is None else y + self.bias

    def base(self) -> ReferenceLayer:
        """The same layer of the base model that the adapters were made for."""
        return self.continued(self.weight - self.tampered)

    def continued(self, weight: Tensor) -> ReferenceLayer:
        """The reference after the adapters are gone: another base weight, with the rounding errors made so far."""
        return ReferenceLayer(weight, self.bias, size=self.size)


def best_error(weight: Tensor, rank: int) -> float:
    """‖W − W_r‖_F with the best approximation W_r of rank r, from an fp64 SVD."""
    return float(torch.linalg.svdvals(weight)[rank:].norm())
