"""The seam to PEFT: puts :func:`pissa_kernels.pissa_init` in place of ``LoraLayer.pissa_init``, and takes it out again.

PEFT has no hook for an initializer, so a few attributes are replaced while a patch is active. ``LoraLayer.pissa_init``
is the one that matters. The others note what it does not know: ``LoraModel._create_and_replace`` the layer's name,
``BaseTuner.inject_adapter`` where a model begins and ends, ``PeftModel.from_pretrained`` and ``load_adapter`` where an
adapter comes from, ``PeftModel.__init__`` the model that will be saved. All wrappers keep what they found. When a patch
ends, wrappers that are over are removed from the top; one that other code has wrapped in the meantime stays below it
and passes calls through.

Layers are collected while ``inject_adapter`` runs and carried out together before it returns, that is, before
``get_peft_model``, ``add_adapter`` or ``from_pretrained`` does: nobody can meet an unfinished layer. What PEFT itself
would read in between (a DoRA magnitude, a gathered ZeRO-3 partition, a tied adapter) makes a layer be done at once.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from . import model as whole_model
from .init import prepare
from .loading import Source
from .memory import Peak
from .report import LayerReport, Report
from .report.progress import progress
from .saving import SavePretrained
from .task import Task
from .ties import Ties

_lock = threading.RLock()
_active: list[PatchedPeft] = []


@dataclass
class Injection:
    """One run of ``inject_adapter``: what it has come by so far."""

    ties: Ties
    tasks: list[Task] = field(default_factory=list)


# Of this thread: name and target module of the layer that PEFT is creating; the injection that it belongs to; where the
# adapter that is being loaded comes from.
_creating: ContextVar[tuple[str, nn.Module] | None] = ContextVar("pissa_kernels_creating", default=None)
_injecting: ContextVar[Injection | None] = ContextVar("pissa_kernels_injecting", default=None)
_loading: ContextVar[Source | None] = ContextVar("pissa_kernels_loading", default=None)


def patch_peft(
    *,
    seed: int = 0,
    on_layer: Callable[[LayerReport], None] | None = None,
    batch: bool = True,
    device: torch.device | str | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> PatchedPeft:
    """Let PEFT's ``init_lora_weights="pissa"`` and ``"pissa_niter_N"`` run this package's initializer.

    As a function it holds for every thread until :func:`unpatch_peft`; as a context manager
    (``with patch_peft() as report:``) for the thread that entered it, until the block ends. Patches nest, the innermost
    does the work; what was in place before, PEFT's own or anybody's, is restored. Layers that this package
    does not handle (3-D expert weights, ``nn.MultiheadAttention``, tensor-parallel layers) go to the method that was
    there, untouched.

    Args:
        seed: of every layer's sketch.
        on_layer: called with each layer's report as soon as the layer is done, for a progress bar.
        batch: carry out the layers of a ``get_peft_model`` together, at its end: on CPUs one layer on each thread, on
            GPUs in stacks of equal shape. False does each where PEFT comes by it.
        device: a GPU, as in "cuda": stream weights that are on the CPU through it.
        memory_budget: bytes that may be used beyond the model and the adapter, on each device; by default half of what
            is free there. Fewer layers are done at once where it is small.
        progress: a bar, where stderr is a terminal and tqdm is installed.

    Returns:
        The report: its ``layers`` has one entry for each layer initialised under this patch.

    Raises:
        ImportError: PEFT is not installed.
        RuntimeError: PEFT no longer has the methods that this package replaces, or there is no such device.
        ValueError: ``device`` without ``batch``, or a budget below 1.
    """
    if device is not None and not batch:
        raise ValueError("device= streams whole waves of layers, which batch=False does not have")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget is a number of bytes above 0, got {memory_budget}")
    where = None if device is None else torch.empty(0, device=device).device  # with its index, and it exists
    resources = whole_model.Resources(where, memory_budget)
    return PatchedPeft(seed=seed, on_layer=on_layer, batch=batch, resources=resources, shown=progress)


def unpatch_peft() -> None:
    """End the innermost patch that :func:`patch_peft` put in place as a function; none is no error."""
    with _lock:
        for patch in reversed(_active):
            if patch.thread is None:
                patch.close()
                return


class PatchedPeft(Report):
    """An active patch and its report.

    Attributes:
        layers: one :class:`LayerReport` for each layer initialised, in PEFT's order.
        seconds: wall time of what was carried out together, and of what was done at once; None before anything was.
        peak_extra_bytes: the most that this process grew while layers were carried out together, adapters included;
            None where that has not happened, or the system does not tell.
    """

    def __init__(
        self,
        *,
        seed: int,
        on_layer: Callable[[LayerReport], None] | None,
        batch: bool,
        resources: whole_model.Resources,
        shown: bool,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.on_layer = on_layer
        self.batch = batch
        self.resources = resources
        self.shown = shown
        self.thread: int | None = None
        self.open = True
        self._seams = _seams(self)
        with _lock:
            for owner, attribute, _ in self._seams:
                if attribute not in vars(owner):
                    raise RuntimeError(
                        f"this PEFT has no {owner.__name__}.{attribute}, which pissa_kernels replaces; "
                        "call pissa_kernels.pissa_init on each layer instead"
                    )
            for owner, attribute, wrapper in self._seams:
                found = vars(owner)[attribute]
                is_classmethod = isinstance(found, classmethod)
                replacement = functools.wraps(found.__func__ if is_classmethod else found)(
                    wrapper(found.__func__ if is_classmethod else found)
                )
                replacement.__dict__.update(_pissa_kernels_patch=self, _pissa_kernels_found=found)
                setattr(owner, attribute, classmethod(replacement) if is_classmethod else replacement)
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

    def initialize(self, layer: Any, adapter_name: str, init: str) -> None:
        """One layer: at once, or when its model has been gone through."""
        injection, source = _injecting.get(), _loading.get()
        name = (_creating.get() or (None,))[0]
        given = source.initial(name, adapter_name) if source is not None else None
        ties = injection.ties if injection is not None else None
        task = prepare(layer, adapter_name, init, seed=self.seed, name=name, ties=ties, given=given)
        if task is None:
            return
        if injection is not None and self.batch and can_wait(layer, adapter_name):
            injection.tasks.append(task.defer())
            return
        report = task.run()
        self.seconds = (self.seconds or 0.0) + report.seconds
        self.layers.append(report)
        if self.on_layer is not None:
            self.on_layer(report)

    def carry_out(self, tasks: list[Task]) -> None:
        """The layers that were collected; those that are done are in the report, whatever happens."""
        reports: dict[Task, LayerReport] = {}
        peak, began = Peak(), time.perf_counter()
        try:
            with peak, progress(len(tasks), "PiSSA", shown=self.shown) as tick:

                def done(task: Task, report: LayerReport) -> None:
                    reports[task] = report
                    tick(report.name, task.weight.nbytes)
                    if self.on_layer is not None:
                        self.on_layer(report)

                whole_model.run(tasks, self.resources, done)
        finally:
            self.layers += [reports[task] for task in tasks if task in reports]
            self.seconds = (self.seconds or 0.0) + time.perf_counter() - began
            if peak.extra_bytes is not None:
                self.peak_extra_bytes = max(peak.extra_bytes, self.peak_extra_bytes or 0)


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
    if creating is not None and isinstance(creating[1], nn.MultiheadAttention):
        return False
    weight = layer.get_base_layer().weight
    # an empty ZeRO-3 partition and a packed 4-bit weight have odd shapes too, and get their own message
    return type(weight.data).__name__ != "DTensor" and (weight.ndim == 2 or weight.numel() == 0)


def can_wait(layer: Any, adapter_name: str) -> bool:
    """Whether nothing reads this layer's weight, A or B before its model has been gone through.

    Not so where a variant takes more from them (DoRA its magnitudes), where the weight is there only now (a gathered
    ZeRO-3 partition), and where the adapter is a view of another one (tied embeddings).
    """
    if adapter_name in layer.lora_variant or hasattr(layer.get_base_layer().weight, "ds_id"):
        return False
    return not any(factor[adapter_name].weight._is_view() for factor in (layer.lora_A, layer.lora_B))


def _seams(patch: PatchedPeft) -> list[tuple[type, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]:
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    def pissa_init(previous: Callable[..., None]) -> Callable[..., None]:
        def wrapper(layer: Any, adapter_name: str, init_lora_weights: str) -> None:
            if patch.applies() and in_scope(layer):
                patch.initialize(layer, adapter_name, init_lora_weights)
            else:
                previous(layer, adapter_name, init_lora_weights)

        return wrapper

    def create(previous: Callable[..., None]) -> Callable[..., None]:
        def wrapper(
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
            token = _creating.set((current_key, target))
            try:
                previous(self, lora_config, adapter_name, target, target_name, parent, current_key, *args, **kwargs)
            finally:
                _creating.reset(token)

        return wrapper

    def inject(previous: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            # an injection that another patch collects for is that patch's
            if not patch.applies() or _injecting.get() is not None:
                return previous(self, model, *args, **kwargs)
            injection = Injection(Ties(model))
            token = _injecting.set(injection)
            try:
                previous(self, model, *args, **kwargs)
            finally:
                _injecting.reset(token)
            if injection.tasks:
                patch.carry_out(injection.tasks)

        return wrapper

    def load(previous: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not patch.applies() or _loading.get() is not None:
                return previous(self, *args, **kwargs)
            source = Source.of_call(previous, self, *args, **kwargs)
            token, seen = _loading.set(source), len(patch.layers)
            try:
                result = previous(self, *args, **kwargs)
            finally:
                _loading.reset(token)
            source.compare(patch.layers[seen:])
            return result

        return wrapper

    def build(previous: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            previous(self, *args, **kwargs)
            if patch.applies():
                # the model's own: it will be saved when this patch is long over
                self.save_pretrained = SavePretrained(self)

        return wrapper

    return [
        (LoraLayer, "pissa_init", pissa_init),
        (LoraModel, "_create_and_replace", create),
        (BaseTuner, "inject_adapter", inject),
        (PeftModel, "from_pretrained", load),
        (PeftModel, "load_adapter", load),
        (PeftModel, "__init__", build),
    ]


def _remove_closed(owner: type, attribute: str) -> None:
    while True:
        found = vars(owner)[attribute]
        function: Any = found.__func__ if isinstance(found, classmethod) else found
        patch = getattr(function, "_pissa_kernels_patch", None)
        if patch is None or patch.open:
            return
        setattr(owner, attribute, function._pissa_kernels_found)
