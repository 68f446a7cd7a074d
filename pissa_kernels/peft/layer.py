"""One layer to be initialized: what is asked, what is written, what is recorded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import layer_context
from ..numerics import exact_arithmetic
from ..pissa import Factors, Recipe, principal_factors
from ..report import LayerReport, Quantization
from ..svd.cost import machine_of, workspace
from . import forward, state
from .quantized import matrix_shape
from .record import InitRecord, check_given, fingerprint, of_adapter, records


@dataclass(frozen=True, eq=False)
class LayerJob:
    """One layer to be initialized, after all checks except those of the weight's values.

    Attributes:
        layer: PEFT's LoRA layer.
        adapter: name of the adapter.
        recipe: rank, scaling, initializer and seed.
        transposed: whether the weight is stored (in, out), as in transformers' ``Conv1D``.
        name: name of the layer in its model; None where it is not known.
        given: initial factors of a trained adapter. The residual is taken against them, without an SVD.
        deferred: whether PEFT has cast A and B to their final dtype already.
    """

    layer: Any
    adapter: str
    recipe: Recipe
    transposed: bool
    name: str | None = None
    given: InitRecord | None = None
    deferred: bool = False

    # Read from the layer every time: PEFT and accelerate may replace the parameter before the job runs.
    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as it is stored."""
        return self.layer.get_base_layer().weight.data  # type: ignore[no-any-return]

    @property
    def view(self) -> Tensor:
        """The weight as (out, in)."""
        return self.weight.mT if self.transposed else self.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out_features, in_features = self.view.shape
        return out_features, in_features

    @property
    def label(self) -> str:
        """The layer in messages."""
        name = f"layer {self.name!r}" if self.name else f"a {type(self.layer.get_base_layer()).__name__} layer"
        return f"{name}, weight {matrix_shape(self.layer.get_base_layer())}"

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Dtype that stores A and B."""
        return self.weight.dtype

    @property
    def is_batched(self) -> bool:
        """Whether layers like this one are decomposed together on a GPU."""
        return True

    @property
    def changes_weight(self) -> bool:
        """Whether the weight changes: another adapter needs no residual already."""
        return not records(self.layer) or all(name == self.adapter for name in self.layer.lora_A)

    def workspace(self, device: torch.device, batch: int = 1) -> int:
        """Bytes beyond the weights that the SVDs of ``batch`` layers like this one take on ``device``."""
        weight = self.weight
        m, n = weight.shape
        machine = machine_of(weight) if device == weight.device else device.type
        return workspace(m, n, self.recipe.rank, self.recipe.niter, machine=machine, batch=batch)

    def defer(self) -> LayerJob:
        """The same job for later. B is set to zero, so that the layer computes W·x until the job has run."""
        self._adapter()[1].data.zero_()
        return replace(self, deferred=True)

    def backup(self) -> Callable[[], object]:
        """A function that makes the weight what it is now."""
        layer, values = self.layer, self.weight.to("cpu", copy=True)
        return lambda: layer.get_base_layer().weight.data.copy_(values)

    def run(self, device: torch.device | None = None) -> LayerReport:
        """Decompose the weight and write A, B and the residual. After an exception the layer is unchanged.

        Args:
            device: where a quantized weight is decomposed; None for its own device.

        Raises:
            RuntimeError, MemoryError: with the name of the layer.
            ValueError: NaN or Inf, values that overflow a dtype, or a weight that the given initial factors were not
                taken from.
        """
        began = time.perf_counter()
        with layer_context(self.label):
            return self.reuse_previous() or self._start(began, device)

    def _start(self, began: float, device: torch.device | None) -> LayerReport:
        """Decompose an original weight."""
        return self.write(principal_factors(self.view, self.recipe), began)

    def reuse_previous(self) -> LayerReport | None:
        """Do what no batch can: use earlier factors, or keep the weight of a layer that has a subtraction already.

        After one layer has failed, a second call of ``get_peft_model`` initializes all others again. Their weights are
        residuals already, so they get the factors that were recorded. The same holds for a second adapter of the same
        settings, such as the reference that TRL copies from the first one: it shares the factors.

        A second adapter of other settings gets the factors of W, which is formed in a temporary. Nothing more is
        subtracted, because the first adapter needs its residual: the layer's forward pass adds what is missing.

        Returns:
            The report; None where the weight is an original one that needs an SVD.

        Raises:
            ValueError: an adapter is merged; the stored weight is not what the records say; the given factors were not
                taken from this weight; a variant that computes with the stored weight, with other settings.
        """
        began = time.perf_counter()
        if self.layer.merged:
            merged = ", ".join(map(repr, self.layer.merged_adapters))
            raise ValueError(f"the adapter {merged} is merged into the weight; call unmerge_adapter() first")
        forward.adopt(self.layer, self.adapter)
        for record in reversed(records(self.layer)):
            if self._repeats(record):
                return self._share(record)
        if records(self.layer):
            if any(name != self.adapter for name in self.layer.lora_A):
                return self._beside(began)
            self._restore()
        return None if self.given is None else self._repeat(self.given, began)

    def _restore(self) -> None:
        """Make the weight of a layer that only this adapter is left on an original one again."""
        forward.restore_(self.layer)

    def _repeat(self, given: InitRecord, began: float) -> LayerReport:
        """Take the residual against the given factors."""
        self._check_given(fingerprint(self.weight).double(), self.weight.dtype)
        return self.write(self._given_factors(), began, dtype=given.lora_A.dtype)

    def _share(self, record: InitRecord) -> LayerReport:
        self.set_adapter(record.lora_A, record.lora_B)
        latest = of_adapter(self.layer, self.adapter)
        if latest is None or latest.lora_A is not record.lora_A:
            forward.remember(self.layer, replace(record, adapter=self.adapter, shared=True))
        return record.report

    def _beside(self, began: float) -> LayerReport:
        """Start the adapter beside one that needs the stored weight: from W, with nothing subtracted."""
        if self.adapter in self.layer.lora_variant:
            raise ValueError(
                f"the adapter {self.adapter!r} ({state.variant_name(self.layer, self.adapter)}) computes with the "
                "stored weight, which is the residual of another adapter. Use the settings of that adapter (rank, "
                "alpha, init_lora_weights, seed), or a model of its own"
            )
        original = state.weight_of(self.layer, None)
        view = original.mT if self.transposed else original
        if self.given is None:
            dtype = self.adapter_dtype
            factors = principal_factors(view, self.recipe, dtype)
        else:
            self._check_given(state.original_fingerprint(self.layer), original.dtype)
            factors, dtype = self._given_factors(), self.given.lora_A.dtype
        lora_A, lora_B = (factor.to("cpu", dtype, copy=True) for factor in (factors.lora_A, factors.lora_B))
        kept = replace(factors, lora_A=lora_A, lora_B=lora_B, singular_values=factors.singular_values.cpu())
        before = fingerprint(original)
        product = state.sampled(original, (lora_A, lora_B), self.transposed)
        with self.restored_on_failure():
            self.set_adapter(factors.lora_A, factors.lora_B)
        after = (before.double() - self.recipe.scaling * product).to(original.dtype).float()
        return self.record(kept, before, after, time.perf_counter() - began, original.dtype, shared=True)

    def _given_factors(self) -> Factors:
        assert self.given is not None
        report, device = self.given.report, self.weight.device
        A, B = self.given.lora_A.to(device).float(), self.given.lora_B.to(device).float()
        return Factors(A, B, report.singular_values, report.certificate)

    def _check_given(self, found: Tensor, dtype: torch.dtype) -> None:
        """Refuse factors that were not taken from W, whose fingerprint is ``found`` and whose dtype is ``dtype``."""
        assert self.given is not None
        check_given(self.given, found, dtype)

    def _repeats(self, record: InitRecord) -> bool:
        """Whether this job would find the factors of an earlier record."""
        report, recipe, given = record.report, self.recipe, self.given
        if given is not None:
            pairs = ((record.lora_A, given.lora_A), (record.lora_B, given.lora_B))
            return report.scaling == recipe.scaling and all(torch.equal(one, other) for one, other in pairs)
        wanted = (recipe.rank, recipe.scaling, recipe.init, recipe.seed)
        return wanted == (report.rank, report.scaling, report.init, report.seed)

    def write(
        self, factors: Factors, began: float, *, dtype: torch.dtype | None = None, residual: Tensor | None = None
    ) -> LayerReport:
        """Write A, B and the residual, in this order, and record them. An exception leaves all three unchanged.

        Args:
            factors: A and B, in values that ``dtype`` represents.
            began: start of the work on this layer, by ``time.perf_counter()``.
            dtype: of the adapter; by default the weight's.
            residual: W_res as the weight is stored, where another device has computed it.
        """
        weight, scaling = self.weight, self.recipe.scaling
        stored = dtype or weight.dtype
        before = fingerprint(weight)
        # copies on the CPU, which need memory: before the weight is changed
        lora_A, lora_B = (factor.to("cpu", stored, copy=True) for factor in (factors.lora_A, factors.lora_B))
        kept = replace(factors, lora_A=lora_A, lora_B=lora_B, singular_values=factors.singular_values.cpu())
        with self.restored_on_failure():
            self.set_adapter(factors.lora_A, factors.lora_B)
            if residual is not None:
                weight.copy_(residual)
            else:
                with exact_arithmetic(weight.device):
                    ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, scaling, self.transposed)
        return self.record(kept, before, fingerprint(weight), time.perf_counter() - began, weight.dtype)

    def record(
        self,
        factors: Factors,
        before: Tensor,
        after: Tensor,
        seconds: float,
        dtype: torch.dtype,
        *,
        shared: bool = False,
        quantization: Quantization | None = None,
    ) -> LayerReport:
        """Record an initialization that has been written.

        Args:
            factors: on the CPU, in memory of their own: A and B in the dtype that stores the adapter.
            before, after: fingerprints of W and of W_res.
            seconds: time that the layer has taken.
            dtype: of W.
            shared: whether nothing was subtracted from the weight.
            quantization: what quantizing the residual has lost.
        """
        out_features, in_features = self.shape
        report = LayerReport(
            name=self.name or f"{type(self.layer.get_base_layer()).__name__}({in_features}, {out_features})",
            shape=(out_features, in_features),
            rank=self.recipe.rank,
            certificate=factors.certificate,
            seconds=seconds,
            singular_values=factors.singular_values,
            dtype=dtype,
            scaling=self.recipe.scaling,
            init=self.recipe.init,
            seed=self.recipe.seed,
            quantization=quantization,
        )
        A, B = factors.lora_A, factors.lora_B
        forward.remember(self.layer, InitRecord(self.adapter, A, B, report, before, after, shared))
        return report

    def _adapter(self) -> tuple[Tensor, Tensor]:
        return self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight

    def set_adapter(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype | None = None) -> None:
        """Write copies of A and B, in ``dtype``, to the adapter. An exception leaves both unchanged."""
        copies, device = [], self.weight.device
        for parameter, value in zip(self._adapter(), (lora_A, lora_B), strict=True):
            if not parameter.is_meta:  # a checkpoint will fill it
                kept = dtype or (parameter.dtype if self.deferred else torch.float32)
                copies.append((parameter, value.to(device, kept, copy=True)))
        for parameter, copied in copies:
            parameter.data = copied

    @contextlib.contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """Context that restores A and B after an exception."""
        before = [parameter.data for parameter in self._adapter()]
        try:
            yield
        except BaseException:
            for parameter, value in zip(self._adapter(), before, strict=True):
                parameter.data = value
            raise
