"""One layer to be initialised: what is asked, what is written, what is remembered."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import parse_init
from ..numerics import exact_arithmetic
from ..pissa import Factors, principal_factors
from ..report import LayerReport
from ..svd.cost import machine_of, workspace
from .record import InitRecord, fingerprint, matches, of_adapter, records, remember


@dataclass(frozen=True, eq=False)
class LayerJob:
    """One layer to be initialised that has passed every check but those of its values.

    Attributes:
        layer: PEFT's LoRA layer.
        adapter: the adapter's name.
        init: "pissa" or "pissa_niter_N".
        seed: of the sketch.
        name: the layer's name in its model; None where it is not known.
        given: the initial factors of an adapter that was trained before: W_res is taken against them, with no SVD.
        deferred: PEFT has already cast A and B to the dtype that they stay in.
    """

    layer: Any
    adapter: str
    init: str
    seed: int = 0
    name: str | None = None
    given: InitRecord | None = None
    deferred: bool = False

    # The layer is asked at every use: PEFT and accelerate may replace a parameter between the plan and the work.
    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as it is stored."""
        return self.layer.get_base_layer().weight.data  # type: ignore[no-any-return]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out), as transformers' ``Conv1D`` stores it."""
        return bool(self.layer.fan_in_fan_out)

    @property
    def view(self) -> Tensor:
        """The weight as (out, in)."""
        return self.weight.mT if self.transposed else self.weight

    @property
    def rank(self) -> int:
        return int(self.layer.r[self.adapter])

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter])

    @property
    def where(self) -> str:
        """The layer, as messages name it."""
        return f"layer {self.name!r}" if self.name else f"a {type(self.layer.get_base_layer()).__name__} layer"

    def workspace(self, device: torch.device) -> int:
        """Bytes beyond the weight that its SVD takes on ``device``."""
        m, n = self.weight.shape
        machine = machine_of(self.weight) if device == self.weight.device else device.type
        return workspace(m, n, self.rank, parse_init(self.init), device=machine)

    def defer(self) -> LayerJob:
        """The same task for later. Until it has run, B is zero: the layer computes what its weight does."""
        self._set_adapter(self._adapter()[0].data, torch.zeros_like(self._adapter()[1]), torch.float32)
        return replace(self, deferred=True)

    def run(self) -> LayerReport:
        """Decompose and write.

        Raises:
            RuntimeError, MemoryError: with the layer's name.
            ValueError: NaN or Inf, or values that exceed a dtype's range; or a weight that the given initial factors
                were not taken from. The layer is untouched then.
        """
        began = time.perf_counter()
        try:
            return self.reuse_previous() or self.write(self._factors(), began)
        except (RuntimeError, MemoryError) as error:  # these do not know the layer
            error.args = (f"{self.where}: {error}",)
            raise

    def _factors(self) -> Factors:
        return principal_factors(
            self.weight,
            self.rank,
            scaling=self.scaling,
            init=self.init,
            fan_in_fan_out=self.transposed,
            seed=self.seed,
            where=f"the weight of {self.where}",
        )

    def reuse_previous(self) -> LayerReport | None:
        """Do what needs no SVD: put back what an earlier call found, or subtract what was given; None where it does.

        After a failure in one layer, a second call of ``get_peft_model`` comes by all the others again. Their weights
        are residuals already, whose principal components are no longer the model's. So they are for a second adapter
        of the same settings, such as the reference that TRL copies from the first: it begins where the first one did,
        on the same residual. To take its own share out of that would change what the first one computes.
        """
        began, weight = time.perf_counter(), self.weight
        for initial in reversed(records(self.layer)):
            if self._repeats(initial) and matches(initial.after, initial.report.dtype, weight):
                self._set_adapter(initial.lora_A, initial.lora_B)
                latest = of_adapter(self.layer, self.adapter)
                if latest is None or latest.lora_A is not initial.lora_A:
                    remember(self.layer, replace(initial, adapter=self.adapter, shared=True))
                return initial.report
        if self.given is None:
            return None
        was, given = self.given.report, self.given
        if not matches(given.before, was.dtype, weight):
            raise ValueError(
                f"the weight of {self.where} {tuple(weight.shape)} is not the one that the adapter's initial factors "
                "were taken from. Load the base model that it was trained on, neither its residual nor another."
            )
        A, B = given.lora_A.to(weight.device).float(), given.lora_B.to(weight.device).float()
        return self.write(Factors(A, B, was.singular_values, was.certificate), began, dtype=given.lora_A.dtype)

    def _repeats(self, initial: InitRecord) -> bool:
        """Whether this initialisation would find what that one did."""
        was, given = initial.report, self.given
        if given is not None:
            pairs = ((initial.lora_A, given.lora_A), (initial.lora_B, given.lora_B))
            return was.scaling == self.scaling and all(torch.equal(one, other) for one, other in pairs)
        return (was.rank, was.scaling, was.init, was.seed) == (self.rank, self.scaling, self.init, self.seed)

    def write(
        self, factors: Factors, began: float, *, dtype: torch.dtype | None = None, residual: Tensor | None = None
    ) -> LayerReport:
        """A, B and the residual, in this order, and the record of it; a failure leaves all three as they were.

        Args:
            factors: A and B, in values that ``dtype`` holds.
            began: when the work on this layer did (``time.perf_counter()``).
            dtype: of the adapter; the weight's by default.
            residual: W_res as the weight is stored, where another device has computed it.
        """
        weight = self.weight
        before = fingerprint(weight)
        with self._restored_on_failure():
            self._set_adapter(factors.lora_A, factors.lora_B)
            if residual is not None:
                weight.copy_(residual)
            else:
                with exact_arithmetic(weight.device):
                    ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, self.scaling, self.transposed)
        lora_A, lora_B = (
            factor.to("cpu", dtype or weight.dtype, copy=True) for factor in (factors.lora_A, factors.lora_B)
        )
        report = self._report(factors, time.perf_counter() - began)
        remember(self.layer, InitRecord(self.adapter, lora_A, lora_B, report, before, fingerprint(weight)))
        return report

    def _report(self, factors: Factors, seconds: float) -> LayerReport:
        out_features, in_features = self.view.shape
        return LayerReport(
            name=self.name or f"{type(self.layer.get_base_layer()).__name__}({in_features}, {out_features})",
            shape=(out_features, in_features),
            rank=self.rank,
            certificate=factors.certificate,
            seconds=seconds,
            singular_values=factors.singular_values.cpu(),
            dtype=self.weight.dtype,
            scaling=self.scaling,
            init=self.init,
            seed=self.seed,
        )

    def _adapter(self) -> tuple[Tensor, Tensor]:
        return self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight

    def _set_adapter(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype | None = None) -> None:
        for parameter, value in zip(self._adapter(), (lora_A, lora_B), strict=True):
            if not parameter.is_meta:  # a checkpoint will fill it
                kept = dtype or (parameter.dtype if self.deferred else torch.float32)
                parameter.data = value.to(self.weight.device, kept, copy=True)

    @contextlib.contextmanager
    def _restored_on_failure(self) -> Iterator[None]:
        before = [parameter.data for parameter in self._adapter()]
        try:
            yield
        except BaseException:
            for parameter, value in zip(self._adapter(), before, strict=True):
                parameter.data = value
            raise
