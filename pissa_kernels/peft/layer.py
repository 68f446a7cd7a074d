"""One layer to be initialized: what is asked, what is written, what is recorded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapter.layouts import Layout, layout_of
from ..checks import layer_context
from ..numerics import exact_arithmetic
from ..pissa import Factors, Recipe, principal_factors, principal_factors_of_batch
from ..report import LayerReport, Quantization
from ..report.layer import of_parts
from ..svd.cost import machine_of, workspace
from ..svd.result import Certificate
from . import forward, state
from .record import InitRecord, check_given, fingerprint, of_adapter, records

Triplets = Sequence[Factors]


@dataclass(frozen=True, eq=False)
class Kept:
    """What a record keeps of a decomposition, on the CPU in memory of its own.

    Attributes:
        lora_A, lora_B: as PEFT stores them, in the dtype that stores the adapter.
        triplets: singular values (r,) and certificate of each matrix.
    """

    lora_A: Tensor
    lora_B: Tensor
    triplets: Sequence[tuple[Tensor, Certificate]]


@dataclass(frozen=True, eq=False)
class LayerJob:
    """One layer to be initialized, after all checks except those of the weight's values.

    Attributes:
        layer: PEFT's LoRA layer.
        adapter: name of the adapter.
        recipe: rank, scaling, initializer and seed, of each of the layer's matrices.
        name: name of the layer in its model; None where it is not known.
        given: initial factors of a trained adapter. The residual is taken against them, without an SVD.
        deferred: whether PEFT has cast A and B to their final dtype already.
    """

    layer: Any
    adapter: str
    recipe: Recipe
    name: str | None = None
    given: InitRecord | None = None
    deferred: bool = False

    @property
    def layout(self) -> Layout:
        """Where the layer has its weight, and how it stores A and B."""
        return layout_of(self.layer)

    # Read from the layer every time: PEFT and accelerate may replace the parameter before the job runs.
    @property
    def weight(self) -> Tensor:
        """The weight, as it is stored."""
        return self.layout.weight.data  # type: ignore[no-any-return]

    @property
    def transposed(self) -> bool:
        """Whether the matrices of the weight are stored (in, out), as in transformers' ``Conv1D``."""
        return self.layout.transposed

    @property
    def parts(self) -> int:
        """Number of matrices."""
        return self.layout.parts

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each matrix."""
        return self.layout.shape(self.weight)

    @property
    def label(self) -> str:
        """The layer in messages."""
        return state.label_of(self.layer, self.name)

    def part_label(self, index: int) -> str:
        """One of its matrices in messages."""
        if self.parts == 1:
            return self.label
        return f"layer {f'{self.title}[{index}]'!r}, weight {self.shape}"

    @property
    def title(self) -> str:
        """Name of the layer in the report."""
        out_features, in_features = self.shape
        return self.name or f"{type(self.layout.module).__name__}({in_features}, {out_features})"

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Dtype that stores A and B."""
        return self.weight.dtype

    @property
    def is_batched(self) -> bool:
        """Whether layers like this one are decomposed together on a GPU."""
        if self.parts > 1:
            return False
        weight = self.weight
        return self.layout.stack(weight).data_ptr() == weight.data_ptr()

    @property
    def changes_weight(self) -> bool:
        """Whether the weight changes: another adapter needs no residual already."""
        return not records(self.layer) or not self._is_beside_another

    @property
    def _is_beside_another(self) -> bool:
        return any(name != self.adapter for name in self.layout.adapters)

    def workspace(self, device: torch.device, batch: int = 1) -> int:
        """Bytes beyond the weights that the SVDs of ``batch`` matrices like those of this layer take on ``device``."""
        matrix = self.layout.stack(self.weight)[0]
        m, n = matrix.shape
        machine = machine_of(matrix) if device == matrix.device else device.type
        return workspace(m, n, self.recipe.rank, self.recipe.niter, machine=machine, batch=batch)

    def defer(self) -> LayerJob:
        """The same job for later. B is set to zero, so that the layer computes W·x until the job has run."""
        self.layout.factors(self.adapter)[1].data.zero_()
        return replace(self, deferred=True)

    def backup(self) -> Callable[[], object]:
        """A function that makes the weight what it is now."""
        layout, values = self.layout, self.weight.to("cpu", copy=True)
        return lambda: layout.weight.data.copy_(values)

    def run(self, device: torch.device | None = None, budget: int | None = None) -> LayerReport:
        """Decompose the weight and write A, B and the residual. After an exception the layer is unchanged.

        Args:
            device: where the weight is decomposed; None for its own device.
            budget: bytes on a GPU for the matrices that are decomposed together; None for one at a time.

        Raises:
            RuntimeError, MemoryError: with the name of the layer.
            ValueError: NaN or Inf, values that overflow a dtype, or a weight that the given initial factors were not
                taken from.
        """
        began = time.perf_counter()
        with layer_context(self.label):
            return self.reuse_previous() or self._start(began, device, budget)

    def _start(self, began: float, device: torch.device | None, budget: int | None) -> LayerReport:
        """Decompose an original weight."""
        return self.write(self._decomposed(self.weight, self.adapter_dtype, device, budget), began)

    def _decomposed(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        device: torch.device | None = None,
        budget: int | None = None,
    ) -> list[Factors]:
        """A and B of each matrix of a weight of this layer, rounded to ``dtype``."""
        found: list[Factors] = []
        matrices = self.layout.matrices(weight)
        device = device or weight.device
        together = 1
        while budget is not None and together < self.parts and self._needed(matrices, 2 * together, device) <= budget:
            together *= 2
        for start in range(0, self.parts, together):
            batch = matrices[start : start + together].to(device)
            if together > 1:
                found += principal_factors_of_batch(list(batch), [self.recipe] * len(batch), dtype)
                continue
            with layer_context(self.part_label(start)):
                found.append(principal_factors(batch[0], self.recipe, dtype))
        return found

    def _needed(self, matrices: Tensor, batch: int, device: torch.device) -> int:
        moved = 0 if matrices.device == device else batch * matrices[0].nbytes
        return self.workspace(device, batch) + moved

    def decompose(self, index: int) -> Factors:
        """A and B of one of the matrices."""
        with layer_context(self.part_label(index)):
            return principal_factors(self.layout.matrices(self.weight)[index], self.recipe)

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
            if self._is_beside_another:
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
        if self.given is None:
            dtype = self.adapter_dtype
            factors: Triplets = self._decomposed(original, dtype)
        else:
            self._check_given(state.original_fingerprint(self.layer), original.dtype)
            factors, dtype = self._given_factors(), self.given.lora_A.dtype
        kept = self.kept(factors, dtype)
        before = fingerprint(original)
        product = state.sampled(original, (kept.lora_A, kept.lora_B), self.layout)
        with self.restored_on_failure():
            self.set_adapter(*self.joined(factors))
        after = (before.double() - self.recipe.scaling * product).to(original.dtype).float()
        return self.record(kept, before, after, time.perf_counter() - began, original.dtype, shared=True)

    def _given_factors(self) -> list[Factors]:
        assert self.given is not None
        report, device = self.given.report, self.weight.device
        A, B = self.layout.split(self.given.lora_A.to(device).float(), self.given.lora_B.to(device).float())
        parts = report.parts or (report,)
        return [
            Factors(left.contiguous(), right.contiguous(), part.singular_values, part.certificate)
            for left, right, part in zip(A, B, parts, strict=True)
        ]

    def joined(self, factors: Triplets) -> tuple[Tensor, Tensor]:
        """A and B as PEFT stores them."""
        if len(factors) == 1:
            return self.layout.joined(factors[0].lora_A.unsqueeze(0), factors[0].lora_B.unsqueeze(0))
        return self.layout.joined(
            torch.stack([each.lora_A for each in factors]), torch.stack([each.lora_B for each in factors])
        )

    def kept(self, factors: Triplets, dtype: torch.dtype) -> Kept:
        """Copies on the CPU, in memory of their own, of what is recorded of a layer."""
        lora_A, lora_B = (factor.to("cpu", dtype, copy=True) for factor in self.joined(factors))
        return Kept(lora_A, lora_B, [(each.singular_values.cpu(), each.certificate) for each in factors])

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
        self, factors: Triplets, began: float, *, dtype: torch.dtype | None = None, residual: Tensor | None = None
    ) -> LayerReport:
        """Write A, B and the residual, in this order, and record them. An exception leaves all three unchanged.

        Args:
            factors: A and B of each matrix, in values that ``dtype`` represents.
            began: start of the work on this layer, by ``time.perf_counter()``.
            dtype: of the adapter; by default the weight's.
            residual: W_res as the weight is stored, where another device has computed it.
        """
        weight = self.weight
        before = fingerprint(weight)
        # copies on the CPU, which need memory: before the weight is changed
        kept = self.kept(factors, dtype or weight.dtype)
        with self.restored_on_failure():
            self.set_adapter(*self.joined(factors))
            if residual is not None:
                weight.copy_(residual)
            else:
                self.subtract(factors)
        return self.record(kept, before, fingerprint(weight), time.perf_counter() - began, weight.dtype)

    def subtract(self, factors: Triplets, first: int = 0) -> None:
        """Subtract s·B·A from matrices of the weight, in place.

        Args:
            factors: A and B of each.
            first: index of the first of these matrices.
        """
        layout = self.layout
        with exact_arithmetic(self.weight.device), layout.writable(self.weight) as stack:
            for matrix, each in zip(stack[first : first + len(factors)], factors, strict=True):
                A, B = each.lora_A.to(matrix.device), each.lora_B.to(matrix.device)
                ops.subtract_lowrank_(matrix, B, A, self.recipe.scaling, self.transposed)

    def record(
        self,
        kept: Kept,
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
            kept: A, B and the certificates.
            before, after: fingerprints of W and of W_res.
            seconds: time that the layer has taken.
            dtype: of W.
            shared: whether nothing was subtracted from the weight.
            quantization: what quantizing the residual has lost.
        """
        reports = [
            LayerReport(
                name=self.title,
                shape=self.shape,
                rank=self.recipe.rank,
                certificate=certificate,
                seconds=seconds / self.parts,
                singular_values=singular_values,
                dtype=dtype,
                scaling=self.recipe.scaling,
                init=self.recipe.init,
                seed=self.recipe.seed,
                quantization=quantization,
            )
            for singular_values, certificate in kept.triplets
        ]
        report = of_parts(self.title, reports, seconds) if len(reports) > 1 else reports[0]
        forward.remember(self.layer, InitRecord(self.adapter, kept.lora_A, kept.lora_B, report, before, after, shared))
        return report

    def set_adapter(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype | None = None) -> None:
        """Write copies of A and B, as PEFT stores them, to the adapter. An exception leaves both unchanged."""
        copies, device = [], self.weight.device
        for parameter, value in zip(self.layout.factors(self.adapter), (lora_A, lora_B), strict=True):
            if not parameter.is_meta:  # a checkpoint will fill it
                kept = dtype or (parameter.dtype if self.deferred else torch.float32)
                copies.append((parameter, value.to(device, kept, copy=True)))
        for parameter, copied in copies:
            parameter.data = copied

    @contextlib.contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """Context that restores A and B after an exception."""
        before = [parameter.data for parameter in self.layout.factors(self.adapter)]
        try:
            yield
        except BaseException:
            for parameter, value in zip(self.layout.factors(self.adapter), before, strict=True):
                parameter.data = value
            raise
