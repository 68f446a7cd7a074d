"""Who is measured: ours, PEFT's own method, and ``torch.svd_lowrank``, behind one signature.

An initializer is timed as PEFT calls it, on a real LoRA layer around an ``nn.Linear`` or a transformers ``Conv1D``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import pissa_kernels
from pissa_kernels import Certificate
from pissa_kernels.pissa import tolerance

ADAPTER = "default"
# lora_alpha/r. Not 1, so that a scaling left out or applied twice shows.
SCALING = 2


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one run left behind.

    Attributes:
        right: (r, in) float32, rows that span the right singular subspace found.
        lora_A: (r, in) as the layer stores it, in the weight's dtype; None where no adapter is made.
        lora_B: (out, r), likewise.
        residual: (out, in) in the weight's dtype.
    """

    right: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    residual: Tensor | None = None


class Subject(Protocol):
    """Something that can be run again and again on one weight."""

    def restore(self) -> None:
        """Undo what a run has changed; never timed."""

    def run(self) -> None:
        """The part that is timed."""

    def outcome(self) -> Outcome:
        """What the last run left behind."""


class LayerSubject:
    """A LoRA layer whose weight is decomposed in place.

    Args:
        weight: as the layer stores it; never written to.
        rank: r.
        fan_in_fan_out: the layer is a ``Conv1D``.
        init: "pissa" or "pissa_niter_N".
        initializer: called with the layer, the adapter's name and ``init``.
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
        torch.manual_seed(0)  # PEFT draws its sketch from the global state
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
    """``torch.svd_lowrank`` and the float32 copy that it needs; no adapter, no residual."""

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
        assert self.vectors is not None, "run() comes first"
        return Outcome(right=self.vectors.mT)


@dataclass(frozen=True)
class Provider:
    """One way to start an adapter.

    Attributes:
        name: as rows and tables call it.
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

    def prepare(self, weight: Tensor, rank: int, fan_in_fan_out: bool) -> Subject:
        """A subject on ``weight``, given as its layer stores it and left unchanged."""
        if self.family == "torch":
            return SketchSubject(weight, rank, fan_in_fan_out, self.niter or 0)
        initializer = _ours if self.family == "ours" else _stock
        return LayerSubject(weight, rank, fan_in_fan_out, self.init, initializer)

    def triplets(self, weight: Tensor, rank: int) -> tuple[Tensor, Certificate] | None:
        """Ours: Vh of ``weight`` (out, in) before any rounding, and its certificate. Nothing for the others."""
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
    """PEFT's LoRA layer around a base layer that holds a copy of ``weight``, its adapter at random values."""
    from peft import LoraConfig, inject_adapter_in_model

    base: Any
    rows, cols = weight.shape
    with torch.device("meta"):  # the default initialisation would only cost time
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
