"""The seam to PEFT: puts :func:`pissa_kernels.pissa_init` in place of ``LoraLayer.pissa_init``, and takes it out again.

PEFT has no hook for an initializer, so two attributes are replaced while a patch is active: ``LoraLayer.pissa_init``,
which does the work, and ``LoraModel._create_and_replace``, which only notes the name and the model of the layer that is
being created and calls what was there. Both wrappers keep what they found. When a patch ends, wrappers that are over
are removed from the top; one that other code has wrapped in the meantime stays below it and passes calls through.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from torch import nn

from .init import initialize
from .report import LayerReport

_lock = threading.RLock()
_active: list[PatchedPeft] = []
# name, model and target module of the layer that PEFT is creating in this thread
_creating: ContextVar[tuple[str, nn.Module, nn.Module] | None] = ContextVar("pissa_kernels_creating", default=None)


def patch_peft(*, seed: int = 0, on_layer: Callable[[LayerReport], None] | None = None) -> PatchedPeft:
    """Let PEFT's ``init_lora_weights="pissa"`` and ``"pissa_niter_N"`` run this package's initializer.

    As a function it holds for every thread until :func:`unpatch_peft`; as a context manager
    (``with patch_peft() as report:``) for the thread that entered it, until the block ends. Patches nest, the innermost
    does the work; what was in place before, PEFT's own or anybody's, is restored. Layers that this package
    does not handle (3-D expert weights, ``nn.MultiheadAttention``, tensor-parallel layers) go to the method that was
    there, untouched.

    Args:
        seed: of every layer's sketch.
        on_layer: called with each layer's report as soon as the layer is done, for a progress bar.

    Returns:
        The report: its ``layers`` has one entry for each layer initialised under this patch.

    Raises:
        ImportError: PEFT is not installed.
        RuntimeError: PEFT no longer has the methods that this package replaces.
    """
    return PatchedPeft(seed=seed, on_layer=on_layer)


def unpatch_peft() -> None:
    """End the innermost patch that :func:`patch_peft` put in place as a function; none is no error."""
    with _lock:
        for patch in reversed(_active):
            if patch.thread is None:
                patch.close()
                return


class PatchedPeft:
    """An active patch and its report.

    Attributes:
        layers: one :class:`LayerReport` for each layer initialised, in PEFT's order.
    """

    def __init__(self, *, seed: int, on_layer: Callable[[LayerReport], None] | None) -> None:
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.lora.model import LoraModel

        self.layers: list[LayerReport] = []
        self.seed = seed
        self.on_layer = on_layer
        self.thread: int | None = None
        self.open = True
        self._seams = ((LoraLayer, "pissa_init", self._init_wrapper), (LoraModel, "_create_and_replace", _note_wrapper))
        with _lock:
            for owner, attribute, _ in self._seams:
                if attribute not in vars(owner):
                    raise RuntimeError(
                        f"this PEFT has no {owner.__name__}.{attribute}, which pissa_kernels replaces; "
                        "call pissa_kernels.pissa_init on each layer instead"
                    )
            for owner, attribute, wrapper in self._seams:
                replacement = wrapper(vars(owner)[attribute])
                replacement.__dict__["_pissa_kernels_patch"] = self
                setattr(owner, attribute, replacement)
            _active.append(self)

    def __enter__(self) -> PatchedPeft:
        self.thread = threading.get_ident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the patch and restore what it found; a second call does nothing."""
        with _lock:
            if not self.open:
                return
            self.open = False
            _active.remove(self)
            for owner, attribute, _ in self._seams:
                _remove_closed(owner, attribute)

    def applies(self) -> bool:
        """Whether this patch is active for the calling thread."""
        return self.open and self.thread in (None, threading.get_ident())

    def _init_wrapper(self, previous: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(previous)
        def pissa_init(layer: Any, adapter_name: str, init_lora_weights: str) -> None:
            if not (self.applies() and in_scope(layer)):
                return previous(layer, adapter_name, init_lora_weights)
            name, model, _ = _creating.get() or (None, None, None)
            report = initialize(layer, adapter_name, init_lora_weights, name=name, seed=self.seed, model=model)
            if report is not None:
                self.layers.append(report)
                if self.on_layer is not None:
                    self.on_layer(report)

        return pissa_init


def in_scope(layer: Any) -> bool:
    """Whether :func:`pissa_init` handles this PEFT layer; all others belong to the method that was there.

    In scope is a 2-D weight that one module owns. Out of it: ``target_parameters`` and fused experts, tensor-parallel
    layers, sharded (DTensor) weights, and ``nn.MultiheadAttention``, whose output projection PEFT wraps first.
    """
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
    from peft.tuners.lora.tp_layer import LoraParallelLinear

    creating = _creating.get()
    if isinstance(layer, (MultiheadAttention, ParamWrapper, LoraParallelLinear)):
        return False
    if creating is not None and isinstance(creating[2], nn.MultiheadAttention):
        return False
    weight = layer.get_base_layer().weight
    # an empty ZeRO-3 partition and a packed 4-bit weight have odd shapes too, and get their own message
    return type(weight.data).__name__ != "DTensor" and (weight.ndim == 2 or weight.numel() == 0)


def _note_wrapper(previous: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(previous)
    def _create_and_replace(
        self: Any,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: Any,
        current_key: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        token = _creating.set((current_key, self.model, target))
        try:
            previous(self, lora_config, adapter_name, target, target_name, parent, current_key, *args, **kwargs)
        finally:
            _creating.reset(token)

    return _create_and_replace


def _remove_closed(owner: type, attribute: str) -> None:
    while (patch := getattr(vars(owner)[attribute], "_pissa_kernels_patch", None)) is not None and not patch.open:
        setattr(owner, attribute, vars(owner)[attribute].__wrapped__)
