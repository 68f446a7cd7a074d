"""State of one thread while PEFT creates layers, and what the hooks need of an active patch."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from ..report import LayerReport
from .layer import LayerJob
from .ties import Ties


class Session(Protocol):
    """An active patch, as :mod:`pissa_kernels.peft.hooks` sees it.

    Attributes:
        layers: the reports of the layers initialized so far.
        open: False once the patch has ended. Its wrappers pass every call through then.
    """

    layers: list[LayerReport]
    open: bool

    def applies(self) -> bool:
        """Whether the patch is active for the calling thread."""

    def initialize(self, layer: Any, adapter_name: str, init: str) -> None:
        """Initialize one layer, now or at the end of the injection."""

    def carry_out(self, jobs: list[LayerJob]) -> None:
        """Initialize the layers collected during an injection."""


@dataclass
class Injection:
    """One call of ``inject_adapter``.

    Attributes:
        ties: parameters of the model that share memory.
        jobs: layers to initialize when the call ends.
    """

    ties: Ties
    jobs: list[LayerJob] = field(default_factory=list)


# Name and module of the layer that PEFT is replacing in this thread.
creating: ContextVar[tuple[str, nn.Module] | None] = ContextVar("pissa_kernels_creating", default=None)
# The injection that runs in this thread.
injecting: ContextVar[Injection | None] = ContextVar("pissa_kernels_injecting", default=None)


def can_wait(layer: Any, adapter_name: str) -> bool:
    """Whether PEFT reads neither the weight nor A nor B of a layer before its injection ends.

    It does read them for variants (DoRA computes its magnitudes), where the weight is only there for now (gathered from
    ZeRO-3 partitions), and where the adapter is a view of another one (tied embeddings).
    """
    if adapter_name in layer.lora_variant or hasattr(layer.get_base_layer().weight, "ds_id"):
        return False
    return not any(factor[adapter_name].weight._is_view() for factor in (layer.lora_A, layer.lora_B))
