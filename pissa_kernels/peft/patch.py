"""``patch_peft`` puts :func:`pissa_kernels.pissa_init` in the place of ``LoraLayer.pissa_init``, and removes it again.

:mod:`pissa_kernels.peft.hooks` lists what is replaced. When a patch ends, its wrappers are removed, except where other
code has wrapped them since: those stay and pass calls through. PEFT's hotswap is replaced for good, for the models that
live on (:mod:`pissa_kernels.peft.guards.swap`).

Layers are collected while ``inject_adapter`` runs and initialized together before it returns, so ``get_peft_model``,
``add_adapter`` and ``from_pretrained`` return finished layers. A layer that PEFT itself reads before that (a gathered
ZeRO-3 partition, a tied adapter, a DoRA magnitude of a residual) is initialized at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from ..adapter.names import own_name
from ..quantize.iteration import DEFAULT_ITERATIONS, Iterations, check_iterations
from ..report import LayerReport, Report
from ..runtime.memory import Peak
from ..runtime.progress import progress as progress_bar
from .hooks import hooks, install, remove_ended
from .injection.first_process import leave_to_first
from .layers import schedule
from .layers.initialize import prepare
from .layers.layer import LayerJob
from .layers.several_gpus import devices_of
from .layers.tied_embeddings import Follower
from .saving.load import loading
from .scope import can_be_deferred, injecting, replacing
from .settings import NOT_QUANTIZED, QuantizedSettings

_lock = threading.RLock()
_active: list[PatchedPeft] = []


def patch_peft(
    *,
    seed: int = 0,
    on_layer: Callable[[LayerReport], None] | None = None,
    batch: bool = True,
    device: torch.device | str | Sequence[torch.device | str] | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
    original: str | os.PathLike[str] | None = None,
    quant_iterations: Iterations = DEFAULT_ITERATIONS,
    nuclear_norms: bool = False,
) -> PatchedPeft:
    """Let PEFT's ``init_lora_weights="pissa"`` and ``"pissa_niter_N"`` run this package's initializer.

    Called as a function, it applies to every thread until :func:`unpatch_peft`. As a context manager
    (``with patch_peft() as report:``) it applies to the thread that entered it, until the block ends. Patches nest, and
    the innermost one does the work. When a patch ends, the methods that it replaced are restored, PEFT's own or those
    of other code. Initialized are ``nn.Linear``, ``Conv1D``, embeddings, convolutions, ``nn.MultiheadAttention``, and
    parameters (``target_parameters``), such as stacks of experts, each expert by itself. Sharded weights are decomposed
    where their shards are. Layers whose weight the model reads without calling them, and shards that PEFT cannot adapt,
    are refused, before the model has been changed; Megatron's tensor-parallel layers go to the method that was there. A
    rank above a layer's width is limited to it, with a warning; one more warning lists the layers that stay plain LoRA,
    if there are any.

    Args:
        seed: seed of every layer's sketch.
        on_layer: called with the report of each layer as soon as the layer is initialized.
        batch: initialize the layers of a ``get_peft_model`` together, at its end: on CPUs one layer on each thread, on
            GPUs in batches of equal shape. With False, each layer is initialized when PEFT creates it.
        device: a GPU, such as "cuda", through which weights that are on the CPU are streamed; None for no streaming. Of
            several GPUs, such as ["cuda:0", "cuda:1"], each gets a share of these weights, and all work at the same
            time; on GPUs of one model the results are those of one GPU. For the copies, host memory is pinned for each
            GPU: at most eight buffers of its largest weight (four, unless a batch is halved), and two of 32 MiB.
        memory_budget: bytes to use beyond the model and the adapter, on each device; None for half of what is free
            there. A smaller budget means fewer layers at once.
        progress: show a progress bar where stderr is a terminal and tqdm is installed.
        original: the 16-bit weights of layers that bitsandbytes has quantized (4 or 8 bits): the folder of the
            checkpoint that the model was quantized from, or the name of a repository whose snapshot is in the local
            cache of the hub. "dequantized" takes the dequantized weights for them, with a warning. Without it, such a
            layer is refused. The layer gets A and B, and a residual in its own format.
        quant_iterations: alternations of SVD and quantization on such a layer: an integer ≥ 1, or "auto" to go on while
            one gains half a percent of the error.
        nuclear_norms: measure the nuclear norms of the quantization errors too, by full SVDs.

    Returns:
        The report. Its ``layers`` has one entry for each layer initialized under this patch.

    Raises:
        FileNotFoundError: ``original`` is neither a folder with safetensors nor a model in the cache.
        ImportError: PEFT is not installed.
        RuntimeError: PEFT no longer has the methods that this package replaces, or there is no such device.
        ValueError: ``device`` without ``batch``, with no device, with one named twice, or with the CPU beside GPUs; a
            budget below 1, or another ``quant_iterations``.

    Examples:
        >>> import peft, torch
        >>> import pissa_kernels as pk
        >>> model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="pissa")
        >>> with pk.patch_peft() as report:
        ...     model = peft.get_peft_model(model, config)
        >>> [(layer.name, layer.shape, layer.rank) for layer in report.layers]
        [('0', (64, 48), 4), ('2', (8, 64), 4)]
    """
    if device is not None and not batch:
        raise ValueError("device= streams batches of layers, so it cannot be combined with batch=False")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget must be a number of bytes above 0, got {memory_budget}")
    resources = schedule.Resources(devices_of(device), memory_budget)
    if original is not None and os.path.isdir(original):
        original = os.path.abspath(original)  # the model may be used in another working directory
    quantized = QuantizedSettings(original, check_iterations(quant_iterations), nuclear_norms)
    return PatchedPeft(
        seed=seed, on_layer=on_layer, batch=batch, resources=resources, progress=progress, quantized=quantized
    )


def unpatch_peft() -> None:
    """End the innermost patch that :func:`patch_peft` started as a function. Without one, nothing happens.

    Examples:
        >>> import pissa_kernels as pk
        >>> from peft.tuners.lora.layer import LoraLayer
        >>> original = LoraLayer.pissa_init
        >>> report = pk.patch_peft()
        >>> LoraLayer.pissa_init is original
        False
        >>> pk.unpatch_peft()
        >>> LoraLayer.pissa_init is original
        True
    """
    with _lock:
        for patch in reversed(_active):
            if patch.thread is None:
                patch.close()
                return


def reopened(seed: int, quantized: QuantizedSettings = NOT_QUANTIZED) -> contextlib.AbstractContextManager[object]:
    """Context in which a patch applies to the calling thread: the active one, or a new one.

    Args:
        seed: of the new patch.
        quantized: its arguments for quantized layers.
    """
    if any(patch.applies() for patch in list(_active)):
        return contextlib.nullcontext()
    original, iterations, nuclear = quantized
    # the checkpoint may be gone by now, and only a new start of a quantized layer reads it
    with contextlib.suppress(OSError, ValueError):
        return patch_peft(
            seed=seed, progress=False, original=original, quant_iterations=iterations, nuclear_norms=nuclear
        )
    return patch_peft(seed=seed, progress=False)


class PatchedPeft(Report):
    """An active patch and its report.

    Attributes:
        layers: one :class:`LayerReport` for each layer initialized, in PEFT's order.
        seconds: wall time of all initializations under this patch; None before the first one.
        peak_extra_bytes: bytes by which the memory of this process grew at most while layers were initialized together,
            adapters included; None if that has not happened, or if the system does not report it.
        thread: the thread that the patch applies to; None for all threads.
        open: False once the patch has ended.
    """

    def __init__(
        self,
        *,
        seed: int,
        on_layer: Callable[[LayerReport], None] | None,
        batch: bool,
        resources: schedule.Resources,
        progress: bool,
        quantized: QuantizedSettings,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.on_layer = on_layer
        self.batch = batch
        self.resources = resources
        self.progress = progress
        self.quantized = quantized
        self._quantizing = quantized.open()
        self.thread: int | None = None
        self.open = True
        self._hooks = hooks()
        with _lock:
            for owner, attribute, _ in self._hooks:
                if attribute not in vars(owner):
                    raise RuntimeError(
                        f"this version of PEFT has no {owner.__name__}.{attribute}, which pissa_kernels replaces; "
                        "call pissa_kernels.pissa_init on each layer instead"
                    )
            for hook in self._hooks:
                install(self, hook)
            _active.append(self)

    def __enter__(self) -> PatchedPeft:
        self.thread = threading.get_ident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the patch and restore what it replaced. A second call does nothing."""
        with _lock:
            if not self.open:
                return
            self.open = False
            _active.remove(self)
            for hook in self._hooks:
                remove_ended(hook)

    def applies(self) -> bool:
        """Whether this patch is active for the calling thread."""
        return self.open and self.thread in (None, threading.get_ident())

    @property
    def reopen(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        """Context in which a patch with this one's seed applies, also after this one has ended; picklable."""
        return functools.partial(reopened, self.seed, self.quantized)

    def initialize(
        self, layer: Any, adapter_name: str, init: str, *, name: str | None = None, is_cast: bool = False
    ) -> None:
        """Initialize one layer: at once, or at the end of the injection."""
        injection, source, place = injecting.get(), loading.get(), name or replacing.get().name
        name = None if place is None else own_name(place)
        if injection is not None and place is not None and name is not None and injection.ties.kept(place):
            injection.tied.append(Follower(layer, adapter_name, name))
            return
        given = source.initial(name, adapter_name) if source is not None else None
        filled_later = injection is not None and injection.filled_later
        around = {} if injection is None else {key: getattr(injection, key) for key in ("ties", "notices", "model")}
        job = prepare(
            layer,
            adapter_name,
            init,
            seed=self.seed,
            name=name,
            given=None if filled_later else given,
            quantizing=self._quantizing,
            deferred=is_cast,
            **around,
        )
        if injection is not None and injection.filled_later:
            self.layers += leave_to_first(injection, layer, adapter_name, job, given)
            return
        if job is None:
            return
        together = self.batch or job.is_sharded or (injection is not None and injection.ties.replicated)
        if injection is not None and can_be_deferred(layer, adapter_name) and together:
            injection.jobs.append(job.defer())
            return
        if injection is not None:
            injection.keep(job)
        report = job.run()
        self.seconds = (self.seconds or 0.0) + report.seconds
        self.layers.append(report)
        if self.on_layer is not None:
            self.on_layer(report)

    def run(self, jobs: list[LayerJob]) -> None:
        """Initialize the collected layers. After an exception the report has those that are finished."""
        reports: dict[LayerJob, LayerReport] = {}
        peak, began = Peak(), time.perf_counter()
        try:
            with peak, progress_bar(len(jobs), "PiSSA", shown=self.progress) as tick:

                def done(job: LayerJob, report: LayerReport) -> None:
                    reports[job] = report
                    tick(report.name, job.weight.nbytes)
                    if self.on_layer is not None:
                        self.on_layer(report)

                schedule.run(jobs, self.resources, done)
        finally:
            self.layers += [reports[job] for job in jobs if job in reports]
            self.seconds = (self.seconds or 0.0) + time.perf_counter() - began
            if peak.extra_bytes is not None:
                self.peak_extra_bytes = max(peak.extra_bytes, self.peak_extra_bytes or 0)
