"""The seam to PEFT: puts :func:`pissa_kernels.pissa_init` in place of ``LoraLayer.pissa_init``, and takes it out again.

What is replaced, and how, is in :mod:`pissa_kernels.peft.hooks`. When a patch ends, wrappers that are over are removed
from the top; one that other code has wrapped in the meantime stays below it and passes calls through.

Layers are collected while ``inject_adapter`` runs and carried out together before it returns, that is, before
``get_peft_model``, ``add_adapter`` or ``from_pretrained`` does: nobody can meet an unfinished layer. What PEFT itself
would read in between (a DoRA magnitude, a gathered ZeRO-3 partition, a tied adapter) makes a layer be done at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ..report import LayerReport, Report
from ..runtime.memory import Peak
from ..runtime.progress import progress
from . import schedule as whole_model
from .hooks import put_in_place, remove_closed, replacements
from .initialize import prepare
from .layer import LayerJob
from .load import loading
from .scope import can_wait, creating, injecting

_lock = threading.RLock()
_active: list[PatchedPeft] = []


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
        raise ValueError("device= streams whole batches of layers, which batch=False does not have")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget is a number of bytes above 0, got {memory_budget}")
    resources = whole_model.Resources(None if device is None else _existing(device), memory_budget)
    return PatchedPeft(seed=seed, on_layer=on_layer, batch=batch, resources=resources, shown=progress)


def _existing(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors name it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise RuntimeError(f"device={str(device)!r} cannot be used: {error}") from None


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
        self._seams = replacements(self)
        with _lock:
            for owner, attribute, _ in self._seams:
                if attribute not in vars(owner):
                    raise RuntimeError(
                        f"this PEFT has no {owner.__name__}.{attribute}, which pissa_kernels replaces; "
                        "call pissa_kernels.pissa_init on each layer instead"
                    )
            for owner, attribute, wrapper in self._seams:
                put_in_place(self, owner, attribute, wrapper)
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
                remove_closed(owner, attribute)

    def applies(self) -> bool:
        """Whether this patch is active for the calling thread."""
        return self.open and self.thread in (None, threading.get_ident())

    def initialize(self, layer: Any, adapter_name: str, init: str) -> None:
        """One layer: at once, or when its model has been gone through."""
        injection, source = injecting.get(), loading.get()
        name = (creating.get() or (None,))[0]
        given = source.initial(name, adapter_name) if source is not None else None
        ties = injection.ties if injection is not None else None
        job = prepare(layer, adapter_name, init, seed=self.seed, name=name, ties=ties, given=given)
        if job is None:
            return
        if injection is not None and self.batch and can_wait(layer, adapter_name):
            injection.jobs.append(job.defer())
            return
        report = job.run()
        self.seconds = (self.seconds or 0.0) + report.seconds
        self.layers.append(report)
        if self.on_layer is not None:
            self.on_layer(report)

    def carry_out(self, jobs: list[LayerJob]) -> None:
        """The layers that were collected; those that are done are in the report, whatever happens."""
        reports: dict[LayerJob, LayerReport] = {}
        peak, began = Peak(), time.perf_counter()
        try:
            with peak, progress(len(jobs), "PiSSA", shown=self.shown) as tick:

                def done(job: LayerJob, report: LayerReport) -> None:
                    reports[job] = report
                    tick(report.name, job.weight.nbytes)
                    if self.on_layer is not None:
                        self.on_layer(report)

                whole_model.run(jobs, self.resources, done)
        finally:
            self.layers += [reports[job] for job in jobs if job in reports]
            self.seconds = (self.seconds or 0.0) + time.perf_counter() - began
            if peak.extra_bytes is not None:
                self.peak_extra_bytes = max(peak.extra_bytes, self.peak_extra_bytes or 0)
