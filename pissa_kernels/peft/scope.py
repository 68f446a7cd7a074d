"""State of one thread while PEFT creates layers, and what the hooks need of an active patch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import nn

from ..adapter.layouts import layout_of
from ..report import LayerReport
from .layers.layer import LayerJob
from .layers.tied_embeddings import Follower
from .notices import Notices
from .weights.record import records
from .weights.ties import Ties

T = TypeVar("T")


class Session(Protocol):
    """An active patch, as :mod:`pissa_kernels.peft.hooks` sees it.

    Attributes:
        layers: reports of the layers initialized so far.
        open: False once the patch has ended. Its wrappers pass every call through then.
    """

    layers: list[LayerReport]
    open: bool

    @property
    def reopen(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        """Context in which a patch with this one's seed applies, also after this one has ended; picklable."""

    def applies(self) -> bool:
        """Whether the patch is active for the calling thread."""

    def initialize(
        self, layer: Any, adapter_name: str, init: str, *, name: str | None = None, is_cast: bool = False
    ) -> None:
        """Initialize one layer, now or at the end of the injection.

        Args:
            layer: the layer.
            adapter_name: name of the adapter.
            init: "pissa" or "pissa_niter_N".
            name: name of the layer in the model; None for that of the module which PEFT replaces.
            is_cast: whether PEFT has cast A and B to their final dtype already.
        """

    def run(self, jobs: list[LayerJob]) -> None:
        """Initialize the layers collected during an injection."""


class ReplacedModule(NamedTuple):
    """The module that PEFT replaces by a LoRA layer.

    Attributes:
        name: its name in the model; None outside of a replacement.
        module: the module; None outside of a replacement.
    """

    name: str | None = None
    module: nn.Module | None = None


@dataclass
class Injection:
    """One call of ``inject_adapter``.

    Attributes:
        ties: parameters of the model that share memory.
        model: the model that PEFT adapts.
        jobs: layers to initialize when the call ends.
        notices: what the user is told when all layers are known.
        wrapped: the LoRA layers that PEFT has put into the model, each with the module that it adapts and every place
            where the model had that: another module and its attribute.
        ranks: ranks and alphas in the config before a layer needed others; None before the first layer.
        is_undone: whether all of the call is undone after a failure.
        tied: layers that follow the embedding whose weight they have.
        weights: functions that restore the weights which the call changes; only where it is undone.
        filled_later: whether the weights of this process will be replaced by those of process 0.
    """

    ties: Ties
    model: nn.Module | None = None
    jobs: list[LayerJob] = field(default_factory=list)
    notices: Notices = field(default_factory=Notices)
    wrapped: list[tuple[list[tuple[nn.Module, str]], nn.Module, nn.Module]] = field(default_factory=list)
    ranks: dict[str, Any] | None = None
    is_undone: bool = False
    tied: list[Follower] = field(default_factory=list)
    weights: list[Callable[[], object]] = field(default_factory=list)
    filled_later: bool = False

    def keep(self, job: LayerJob) -> None:
        """Keep a copy of the weight of a layer that the call changes, if the call is undone after a failure."""
        if self.is_undone and job.changes_weight:
            self.weights.append(job.backup())

    def undo(self) -> None:
        """Put back the modules that PEFT has wrapped, and the weights."""
        self.unwrap()
        for restore in self.weights:
            restore()

    def unwrap(self) -> None:
        """Put the modules that PEFT has wrapped back into the model."""
        for holders, layer, target in reversed(self.wrapped):
            for holder, attribute in holders:
                if holder._modules[attribute] is layer:
                    holder._modules[attribute] = target
            unwrap_attention(target)


def unwrap_attention(target: nn.Module) -> None:
    """Put the ``out_proj`` of an attention back, which PEFT wraps before it wraps the attention."""
    projection: Any = getattr(target, "out_proj", None)
    if isinstance(target, nn.MultiheadAttention) and hasattr(projection, "get_base_layer"):
        target.out_proj = projection.get_base_layer()


# The replacement and the injection that run in this thread.
replacing: ContextVar[ReplacedModule] = ContextVar("pissa_kernels_replacing", default=ReplacedModule())  # noqa: B039
injecting: ContextVar[Injection | None] = ContextVar("pissa_kernels_injecting", default=None)


@contextlib.contextmanager
def setting(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Context in which a context variable has another value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def can_be_deferred(layer: Any, adapter_name: str) -> bool:
    """Whether PEFT reads neither the weight nor A nor B of a layer before its injection ends.

    PEFT does read them where the weight is gathered from ZeRO-3 partitions for the duration of the call, where the
    adapter is a view of another one (tied embeddings), and for variants: DoRA computes its magnitudes from W + s·B·A.
    That is W all the same, as B is zero until then, unless the weight is a residual.
    """
    layout = layout_of(layer)
    if hasattr(layout.weight, "ds_id") or (adapter_name in layer.lora_variant and records(layer)):
        return False
    return not any(factor._is_view() for factor in layout.factors(adapter_name))
