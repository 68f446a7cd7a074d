"""One layer to be initialized: whether earlier factors are used again, and the SVDs of an original weight."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...checks import layer_context
from ...factors import Factors
from ...pissa import principal_factors, principal_factors_of_batch
from ...report import LayerReport
from ...svd.cost import workspace
from ...svd.machines import machine_of
from ..weights import forward, known, state
from ..weights.record import InitRecord, check_given, matches, of_adapter, records
from .writing import LayerWriter


@dataclass(frozen=True, eq=False)
class LayerJob(LayerWriter):
    """One layer to be initialized, after all checks except those of the weight's values."""

    @property
    def is_batched(self) -> bool:
        """Whether layers like this one are decomposed together on a GPU."""
        return self.parts == 1 and self.is_view

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

    def check_adapter(self) -> None:
        """Refuse an adapter whose A and B do not have the shapes that the weight takes."""
        (out_features, in_features), rank, parts = self.shape, self.recipe.rank, self.parts
        lora_A, lora_B = self.layout.factors(self.adapter)
        empty = torch.empty(0, device="meta")
        joined = self.layout.joined(
            empty.new_empty(parts, rank, in_features), empty.new_empty(parts, out_features, rank)
        )
        found, expected = ([tuple(factor.shape) for factor in pair] for pair in ((lora_A, lora_B), joined))
        if lora_A.numel() and lora_B.numel() and found != expected:
            raise ValueError(
                f"with fan_in_fan_out={self.transposed} the weight takes A {expected[0]} and B {expected[1]}, but the "
                f"adapter has A {found[0]} and B {found[1]}"
            )

    def check_original(self) -> None:
        """Refuse given factors of another weight, before the first layer of the model changes."""
        layout = self.layout
        if self.given is not None and not (records(self.layer) or records(layout.module, layout.parameter)):
            self._check_given(self.fingerprint().double(), self.weight.dtype)

    def is_of(self, record: InitRecord) -> bool:
        """Whether the stored weight is the one that a record was taken from."""
        dtypes = (record.report.dtype, self.weight.dtype)
        return matches(record.before, self.fingerprint(), dtypes, other=record.after)

    def _repeat(self, given: InitRecord, began: float) -> LayerReport:
        """Take the residual against the given factors."""
        self._check_given(self.fingerprint().double(), self.weight.dtype)
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
        original = self.original()
        if self.given is None:
            dtype = self.adapter_dtype
            factors = self._decomposed(original, dtype)
        else:
            self._check_given(known.original_fingerprint(self.layer), original.dtype)
            factors, dtype = self._given_factors(), self.given.lora_A.dtype
        joined = self.joined(factors)
        kept = self.kept(factors, dtype, joined)
        before = self.fingerprint(original)
        product = known.sampled(self.weight, (kept.lora_A, kept.lora_B), self.layout)
        with self.restored_on_failure():
            self.set_adapter(*joined)
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
