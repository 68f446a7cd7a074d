"""One layer with a quantized weight: A, B and a residual in the same format, from the original weight."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import DTYPE_SENTENCE, check_weight, quantization_of
from ...factors import Factors
from ...quantize.bnb import PackedEightBit
from ...quantize.iteration import (
    DEFAULT_ITERATIONS,
    Iterations,
    error_of,
    quantized_factors,
    quantized_residual,
    quantized_weight,
)
from ...report import LayerReport, Quantization
from ...svd.cost import workspace
from ...svd.machines import machine_of
from ..weights import forward, known, quantized, state
from ..weights.quantized import BnbPacked, BnbScheme
from ..weights.record import InitRecord, fingerprint, matches, records
from .layer import LayerJob
from .originals import Dequantized, Originals

# Distance of the layer's weight from Q(W), relative to ‖W − Q(W)‖_F: codes that another device or version of
# bitsandbytes rounds in another way, and bfloat16 scales. That of another model is above 0.5.
SAME = 0.1
# Distance of 64 elements of W − E and W − E′, in units of the root mean square of both errors.
ERRORS = 3.0
# Bytes for each element of a weight beyond the SVD's: float32 copies of W and W_res, and those of bitsandbytes.
BYTES_PER_ELEMENT = 20


@dataclass(frozen=True)
class Quantizing:
    """How quantized layers are initialized.

    Attributes:
        originals: where their weights come from; None where nothing was given.
        iterations: of SVD and quantization.
        nuclear: whether nuclear norms of the errors are measured.
    """

    originals: Originals | None = None
    iterations: Iterations = DEFAULT_ITERATIONS
    nuclear: bool = False


@dataclass(frozen=True, eq=False)
class QuantizedLayerJob(LayerJob):
    """A layer of bitsandbytes to be initialized.

    Attributes:
        model: the model that PEFT adapts; None where it is not known.
        quantizing: the source of the original weight, and the iterations.
    """

    model: nn.Module | None = None
    quantizing: Quantizing = Quantizing()

    @property
    def shape(self) -> tuple[int, int]:
        return quantized.shape_of(self.layer.get_base_layer())

    @property
    def adapter_dtype(self) -> torch.dtype:
        # PEFT keeps an adapter of a packed weight as it has created it, in torch's default dtype
        return self.layout.factors(self.adapter)[0].dtype if self.deferred else torch.float32

    @property
    def is_batched(self) -> bool:
        return False

    @property
    def scheme(self) -> BnbScheme:
        """The format of the weight, which the residual gets too."""
        scheme = quantized.scheme_of(self.layer.get_base_layer())
        assert scheme is not None  # checked before there was a job
        return scheme

    def workspace(self, device: torch.device, batch: int = 1) -> int:
        m, n = self.shape
        machine = machine_of(torch.empty(1, 1, dtype=torch.bfloat16)) if device.type == "cpu" else device.type
        svd = workspace(m, n, self.recipe.rank, self.recipe.niter, machine=machine, batch=1)
        return batch * (svd + BYTES_PER_ELEMENT * m * n)

    def backup(self) -> Callable[[], object]:
        return quantized.kept(self.layer.get_base_layer())

    def check_original(self) -> None:
        """Nothing: the weight is compared with the original one when that is read."""

    def _restore(self) -> None:
        """Nothing: the original weight is read again."""

    def _start(self, began: float, device: torch.device | None, budget: int | None) -> LayerReport:
        weight = self._original(device)
        plain = quantized_weight(weight, self.scheme).dequantize()
        self._check_original(weight, plain)
        found = quantized_factors(
            weight,
            self.recipe,
            self.scheme,
            self.quantizing.iterations,
            adapter_dtype=self.adapter_dtype,
            nuclear=self.quantizing.nuclear,
            plain=plain,
        )
        return self._put(found, found.packed, began, weight.dtype, found.quantization)

    def _repeat(self, given: InitRecord, began: float) -> LayerReport:
        (factors,), report = self._given_factors(), given.report
        live = quantized.packed_of(self.layer.get_base_layer())
        if self._is_residual(live, given):  # loaded from a checkpoint
            return self._put(factors, None, began, report.dtype, report.quantization)
        weight = self._original(None)
        if report.quantization is None:
            return self._quantize_residual(given, factors, weight, began)
        packed = quantized_residual(weight, factors.lora_A, factors.lora_B, report.scaling, self.scheme)
        if not self._is_residual(packed, given):
            raise ValueError(
                "the original weight is not the one that the adapter's initial factors were taken from, or it was "
                "quantized with other settings. Pass the checkpoint, and load the model with the quantization, of the "
                "training"
            )
        return self._put(factors, packed, began, report.dtype, report.quantization)

    def _quantize_residual(self, given: InitRecord, factors: Factors, weight: Tensor, began: float) -> LayerReport:
        """Quantize the residual of an adapter that was trained on a 16-bit model."""
        super()._check_given(fingerprint(weight).double(), weight.dtype)
        plain = quantized_weight(weight, self.scheme).dequantize()
        self._check_original(weight, plain)
        A, B, scaling = factors.lora_A, factors.lora_B, given.report.scaling
        packed = quantized_residual(weight, A, B, scaling, self.scheme)
        error = error_of(weight, A, B, scaling, packed)
        quantization = Quantization(self.scheme.name, error, _distance(weight, plain), iterations=1)
        return self._put(factors, packed, began, weight.dtype, quantization)

    def _check_given(self, found: Tensor, dtype: torch.dtype) -> None:
        """Refuse factors of another weight than W, of which ``found`` and the record have different errors."""
        assert self.given is not None
        quantizations = (
            self.given.report.quantization,
            *(record.report.quantization for record in records(self.layer)),
        )
        error = math.hypot(*(each.error for each in quantizations if each is not None))
        m, n = self.shape
        off = float((found - self.given.before.double()).square().mean().sqrt())
        if off > ERRORS * error / math.sqrt(m * n):
            super()._check_given(found, dtype)

    def _is_residual(self, packed: Any, given: InitRecord) -> bool:
        dtypes = (given.report.dtype, torch.bfloat16)
        return matches(given.after, fingerprint(packed.dequantize()), dtypes, other=given.before)

    def _original(self, device: torch.device | None) -> Tensor:
        """The original weight (out, in), in the dtype that the layer dequantizes to."""
        base = self.layer.get_base_layer()
        if self.quantizing.originals is None:
            raise _without_original(base)
        weight = self.quantizing.originals.weight(self.model, self.name, base)
        check_weight(weight)
        # in the standard order, because packing codes for a CPU changes the dtype as well
        live = quantized.packed_of(base)
        dtype = weight.dtype if isinstance(live, PackedEightBit) else live.state.dtype
        return weight.to(self.weight.device if device is None else device, dtype)

    def _check_original(self, weight: Tensor, plain: Tensor) -> None:
        """Refuse an original whose quantized values are not those of the layer.

        Args:
            weight: W.
            plain: Q(W).

        Raises:
            ValueError: with the distance.
        """
        if isinstance(self.quantizing.originals, Dequantized):
            return
        if kept := records(self.layer):  # a residual, of an adapter that is gone
            errors = math.hypot(*(record.report.quantization.error for record in kept if record.report.quantization))
            off = _distance(state.weight_of(self.layer, None).to(weight.device), weight)
            if off > ERRORS * errors:
                raise ValueError(
                    f"the original one is not the weight that the layer is a residual of: they are {off:.3g} apart, "
                    f"and quantization accounts for {errors:.3g}. Pass the checkpoint that the model was quantized from"
                )
            return
        live = quantized.values_of(self.layer.get_base_layer()).to(weight.device)
        error, off = _distance(weight, plain), _distance(live, plain)
        if off <= SAME * error:
            return
        # int8 does not say what dtype the model had that was quantized
        for dtype in {torch.bfloat16, torch.float16} - {weight.dtype} if weight.dtype == torch.float32 else ():
            if _distance(live, quantized_weight(weight.to(dtype), self.scheme).dequantize()) <= SAME * error:
                return
        raise ValueError(
            f"its quantized weight is not that of the original one (they are {off:.3g} apart, and quantization "
            f"accounts for {error:.3g}): it is a residual already, or of another model. Load the model that belongs to "
            "the original checkpoint, quantized"
        )

    def _put(
        self,
        factors: Factors,
        packed: Any,
        began: float,
        dtype: torch.dtype,
        quantization: Quantization | None,
    ) -> LayerReport:
        """Write A, B and the residual (None for the one that is there), and record them. All or nothing."""
        base, device = self.layer.get_base_layer(), self.weight.device
        stored: BnbPacked = quantized.packed_of(base) if packed is None else quantized.moved(packed, device)
        values = stored.dequantize()
        kept = self.kept([factors], self._stored_dtype)
        after = fingerprint(values)
        # of W − E, which is what the layer knows of its weight
        product = known.sampled(values, (kept.lora_A, kept.lora_B), self.layout)
        before = (after.double() + self.recipe.scaling * product).float()
        with self.restored_on_failure():
            self.set_adapter(factors.lora_A, factors.lora_B)
            if records(self.layer) and self.changes_weight:
                forward.drop(self.layer)  # of an adapter that is gone
            if packed is not None:
                quantized.put(base, stored)
        quantized.saved_in_standard_order(base)
        return self.record(kept, before, after, time.perf_counter() - began, dtype, quantization=quantization)

    @property
    def _stored_dtype(self) -> torch.dtype:
        return self.adapter_dtype if self.given is None else self.given.lora_A.dtype


def quantized_job(job: LayerJob, model: nn.Module | None, quantizing: Quantizing) -> QuantizedLayerJob:
    """The job for a layer whose weight is quantized by bitsandbytes.

    Raises:
        TypeError: no original weight is at hand, and the layer has no initial factors.
        ValueError: a variant of LoRA that computes with the stored weight.
    """
    fields = {name: getattr(job, name) for name in LayerJob.__dataclass_fields__}
    found = QuantizedLayerJob(**fields, model=model, quantizing=quantizing)
    base = job.layer.get_base_layer()
    if job.adapter in job.layer.lora_variant:
        raise ValueError(
            f"{state.variant_name(job.layer, job.adapter)} takes norms from the stored weight, which is quantized, and "
            "PiSSA changes it. Leave the option out, or load the model without quantization"
        )
    if job.given is None and not records(job.layer):
        if quantizing.originals is None:
            raise _without_original(base)
        quantizing.originals.check(model, job.name, base)
    return found


def _without_original(base: Any) -> TypeError:
    kind = quantization_of(base.weight) or "bitsandbytes"
    return TypeError(
        f"{DTYPE_SENTENCE} the weight is quantized ({kind}), and PiSSA starts from the weight before that. Pass the "
        "checkpoint that it was quantized from, patch_peft(original=FOLDER), or original='dequantized' to take the "
        "dequantized weight for it; or load the model without quantization"
    )


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one.float() - other.float()))
