"""A model of Llama's shape whose weights are made on the device, within a second for seven billion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pissa_kernels.adapter.layers import lora_layers

from ..harness import gate
from ..harness.dtypes import DTYPES, UNIT_ROUNDOFF
from ..harness.gate import PISSA_LIMIT, above
from ..models.llama import Base, ModelCase, targets

# Projections of the first and the last layer whose factors are compared with float64.
SAMPLES = ("q_proj", "gate_proj", "down_proj")


def spiked_weight(shape: tuple[int, int], seed: int, device: str) -> Tensor:
    """A (m, n) float32 weight: spikes of size 3·j^(−0.35), j ≤ min(m, n)/16, over a Gaussian bulk whose edge is 1.

    A spike θ becomes the singular value √((θ² + m·s²)(θ² + n·s²))/θ, s = 1/(√m + √n), where that is above the edge
    (Benaych-Georges & Nadakuditi 2012, arXiv 1103.2221). At n = 4096 rank 16 is well above the bulk; at rank 128 the
    next singular value is 0.1 % smaller.
    """
    (m, n), k = shape, min(shape) // 16
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    bulk: Tensor = randn(m, n) / (m**0.5 + n**0.5)
    values = 3 * torch.arange(1, k + 1, device=device) ** -0.35
    return bulk.addmm_(randn(m, k) / m**0.5 * values, (randn(n, k) / n**0.5).mT)


class DeviceModel(Base):
    """A base model; instead of keeping a copy of its weights, it makes them again.

    Args:
        case: layers, widths, rank and dtype.
        maker: device that makes the weights.
        home: device of the model.
    """

    def __init__(self, case: ModelCase, maker: str, home: str) -> None:
        self.case = case
        self.maker = maker
        self.model = case.empty().to_empty(device=home)
        self.adapted: Any = None

    def original(self, index: int, shape: tuple[int, int]) -> Tensor:
        """The weight of the projection at this position of :func:`targets`."""
        return spiked_weight(shape, index, self.maker).to(DTYPES[self.case.dtype])

    def restore(self, device: str) -> None:
        """Remove the adapter and restore the original weights."""
        if self.adapted is not None:
            self.adapted.unload()
            self.adapted = None
        for index, (_, module) in enumerate(targets(self.model)):
            module.weight.data.copy_(self.original(index, (module.out_features, module.in_features)))
        torch.manual_seed(0)  # PEFT draws its sketch from the global generator


@dataclass(frozen=True)
class Accuracy:
    """Largest figures of the sampled layers, against float64.

    Attributes:
        energy_deficit: of the rows of A as stored.
        residual_deficit: 1 − (‖W‖_F² − ‖W − s·B·A‖_F²)/optimum; a wrong B increases it.
        rounding: :func:`bench.harness.gate.rounding_error`.
        sampled: number of layers.
    """

    energy_deficit: float
    residual_deficit: float
    rounding: float
    sampled: int

    def rejection(self, dtype: torch.dtype) -> str | None:
        """Why "pissa" may not be timed, or None."""
        # each element of A and of B is off by at most u: together an energy of at most (2u)² of the adapter's
        stored = PISSA_LIMIT + 4 * UNIT_ROUNDOFF[dtype] ** 2
        return (
            above("energy deficit", self.energy_deficit, PISSA_LIMIT)
            or above("residual deficit", self.residual_deficit, stored)
            or above(gate.ROUNDING, self.rounding, 1.0)
        )


def accuracy(base: DeviceModel) -> Accuracy:
    """The accuracy of :data:`SAMPLES` in the first and the last layer."""
    figures = []
    for index, (name, layer) in enumerate(lora_layers(base.adapted)):
        depth, projection = int(name.split("layers.")[1].split(".")[0]), name.rpartition(".")[2]
        if projection not in SAMPLES or depth not in (0, base.case.layers - 1):
            continue
        A, B = (factor["default"].weight.detach().to(base.maker) for factor in (layer.lora_A, layer.lora_B))
        residual, scaling = layer.get_base_layer().weight.detach().to(base.maker), layer.scaling["default"]
        truth = gate.reference(base.original(index, tuple(residual.shape)))
        optimum, W = truth.optimum(len(A)), truth.weight
        left = W - scaling * (B.double() @ A.double())
        captured = float(W.square().sum() - left.square().sum())
        deficits = gate.subspace_deficit(W, A, optimum), 1 - captured / optimum
        figures.append((*deficits, gate.rounding_error(W, residual, B, A, scaling)))
    columns = torch.tensor(figures, dtype=torch.float64)
    energy, residual_energy, rounding = columns.amax(0).tolist()  # amax propagates NaN
    return Accuracy(energy, residual_energy, rounding, sampled=len(figures))
