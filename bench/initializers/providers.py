"""The providers: ``pissa_init`` ("ours"), PEFT's own method and ``torch.svd_lowrank``, behind one signature.

Initializers are timed as PEFT calls them, on a LoRA layer around an ``nn.Linear`` or a transformers ``Conv1D``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import pissa_kernels
from pissa_kernels import Certificate
from pissa_kernels.factors import tolerance

from ..harness.timing import Subject

ADAPTER = "default"
# lora_alpha/r. Not 1, so that an omitted or repeated scaling is an error.
SCALING = 2


@dataclass(frozen=True, eq=False)
class Outcome:
    """Result of one run. All but ``right`` are None for a provider that makes no adapter.

    Attributes:
        right: (r, in) float32, rows that span the computed right singular subspace.
        lora_A: (r, in) in the weight's dtype, as a checkpoint stores it.
        lora_B: (out, r) in the weight's dtype.
        residual: (out, in) in the weight's dtype.
    """

    right: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    residual: Tensor | None = None


class Initializer(Subject, Protocol):
    """A provider prepared on one weight."""

    def outcome(self) -> Outcome:
        """Result of the last run."""


class LayerSubject:
    """A LoRA layer whose weight is decomposed in place.

    Args:
        weight: weight as the layer stores it; not modified.
        rank: r.
        fan_in_fan_out: whether the layer is a ``Conv1D``.
        init: "pissa" or "pissa_niter_N".
        initializer: function of the layer, the adapter's name and ``init``.
    """

    def __init__(
        self, weight: Tensor, rank: int, fan_in_fan_out: bool, init: str, initializer: Callable[[Any, str, str], None]
    ) -> None:
        self.weight = weight
        self.fan_in_fan_out = fan_in_fan_out
        self.init = init
        self.initializer = initializer
        self.layer = lora_layer(weight, rank, fan_in_fan_out)

    def restore(self) -> None:
        torch.manual_seed(0)  # PEFT draws its sketch from the global generator
        self.layer.get_base_layer().weight.data = self.weight.clone()

    def run(self) -> None:
        self.initializer(self.layer, ADAPTER, self.init)

    def outcome(self) -> Outcome:
        residual = self.layer.get_base_layer().weight.data
        lora_A = self.layer.lora_A[ADAPTER].weight.data
        lora_B = self.layer.lora_B[ADAPTER].weight.data
        return Outcome(
            right=lora_A.float(),
            lora_A=lora_A.to(self.weight.dtype),
            lora_B=lora_B.to(self.weight.dtype),
            residual=residual.mT if self.fan_in_fan_out else residual,
        )


class SketchSubject:
    """``torch.svd_lowrank`` on a float32 copy of the weight; no adapter, no residual."""

    def __init__(self, weight: Tensor, rank: int, fan_in_fan_out: bool, niter: int) -> None:
        self.weight = weight.mT if fan_in_fan_out else weight
        self.rank = rank
        self.niter = niter
        self.vectors: Tensor | None = None

    def restore(self) -> None:
        torch.manual_seed(0)
        self.vectors = None

    def run(self) -> None:
        _, _, self.vectors = torch.svd_lowrank(self.weight.float(), self.rank, niter=self.niter)

    def outcome(self) -> Outcome:
        assert self.vectors is not None, "call run() first"
        return Outcome(right=self.vectors.mT)


@dataclass(frozen=True)
class Provider:
    """One way to initialize an adapter.

    Attributes:
        name: name in rows and tables.
        family: "ours", "peft" or "torch".
        init: "pissa" or "pissa_niter_N".
    """

    name: str
    family: str
    init: str

    @property
    def niter(self) -> int | None:
        """N of "pissa_niter_N", None for "pissa"."""
        _, _, rounds = self.init.partition("_niter_")
        return int(rounds) if rounds else None

    def prepare(self, weight: Tensor, rank: int, fan_in_fan_out: bool) -> Initializer:
        """The provider on ``weight``, which is stored as in its layer and is not modified."""
        if self.family == "torch":
            return SketchSubject(weight, rank, fan_in_fan_out, self.niter or 0)
        initializer = _ours if self.family == "ours" else _stock
        return LayerSubject(weight, rank, fan_in_fan_out, self.init, initializer)

    def triplets(self, weight: Tensor, rank: int) -> tuple[Tensor, Certificate] | None:
        """For ours, Vh of ``weight`` (out, in) before rounding, and its certificate; None for the others."""
        if self.family != "ours":
            return None
        svd = pissa_kernels.truncated_svd(weight, rank, tol=tolerance(weight.dtype), niter=self.niter)
        return svd.Vh, svd.certificate


def _ours(layer: Any, adapter: str, init: str) -> None:
    pissa_kernels.pissa_init(layer, adapter, init)


def _stock(layer: Any, adapter: str, init: str) -> None:
    from peft.tuners.lora.layer import LoraLayer

    LoraLayer.pissa_init(layer, adapter, init)


def lora_layer(weight: Tensor, rank: int, fan_in_fan_out: bool) -> Any:
    """PEFT's LoRA layer around a base layer with a copy of ``weight``; its adapter has random values."""
    from peft import LoraConfig, inject_adapter_in_model

    base: Any
    rows, cols = weight.shape
    with torch.device("meta"):  # skips the default initialization
        if fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            base = Conv1D(cols, rows)
        else:
            base = nn.Linear(cols, rows, bias=False)
    base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if fan_in_fan_out:
        base.bias = nn.Parameter(weight.new_zeros(cols), requires_grad=False)
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALING * rank,
        target_modules=["0"],
        init_lora_weights=False,
        fan_in_fan_out=fan_in_fan_out,
    )
    return inject_adapter_in_model(config, nn.Sequential(base), ADAPTER)[0]


INITS = ("pissa", *(f"pissa_niter_{rounds}" for rounds in (1, 4, 16)))
PROVIDERS = {
    provider.name: provider
    for provider in (
        *(Provider(f"{family} {init}", family, init) for family in ("ours", "peft") for init in INITS),
        Provider("torch svd_lowrank niter 4 (SVD only)", "torch", "pissa_niter_4"),
    )
}
