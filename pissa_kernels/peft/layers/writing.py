"""What is written to a layer, and recorded: A, B and the residual of each of its matrices."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...adapter.layouts import Layout, layout_of
from ...factors import Factors, Recipe
from ...numerics import exact_arithmetic
from ...report import LayerReport, Quantization
from ...report.layer import of_parts
from ...runtime.shards import part_of, put_, values_of
from ...svd.result import Certificate
from ..weights import forward, state
from ..weights.record import InitRecord, fingerprint


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
class LayerWriter:
    """A layer with an adapter that is to be initialized, and how what is found for it is written.

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

    @functools.cached_property
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
    def is_view(self) -> bool:
        """Whether the matrices are views of the weight, and no copies, as of a convolution in another memory format."""
        weight = self.weight
        return self.layout.stack(weight).data_ptr() == weight.data_ptr()

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
    def is_sharded(self) -> bool:
        """Whether several processes hold the weight in parts, and run the job together."""
        return False

    def fingerprint(self, weight: Tensor | None = None) -> Tensor:
        """:func:`pissa_kernels.peft.weights.record.fingerprint` of the weight, or of another one in its place."""
        return fingerprint(self.weight if weight is None else weight)

    def original(self) -> Tensor:
        """W of a layer that stores a residual, as the weight is stored."""
        return state.weight_of(self.layer, None)

    def joined(self, factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
        """A and B as PEFT stores them."""
        if len(factors) == 1:
            return self.layout.joined(factors[0].lora_A.unsqueeze(0), factors[0].lora_B.unsqueeze(0))
        return self.layout.joined(
            torch.stack([each.lora_A for each in factors]), torch.stack([each.lora_B for each in factors])
        )

    def kept(self, factors: Sequence[Factors], dtype: torch.dtype, joined: tuple[Tensor, Tensor] | None = None) -> Kept:
        """Copies on the CPU, in memory of their own, of what is recorded of a layer.

        Args:
            factors: A and B of each matrix.
            dtype: that stores the adapter.
            joined: result of :meth:`joined`, where it is at hand.
        """
        lora_A, lora_B = (factor.to("cpu", dtype, copy=True) for factor in joined or self.joined(factors))
        return Kept(lora_A, lora_B, [(each.singular_values.cpu(), each.certificate) for each in factors])

    def write(
        self,
        factors: Sequence[Factors],
        began: float,
        *,
        dtype: torch.dtype | None = None,
        residual: Tensor | None = None,
    ) -> LayerReport:
        """Write A, B and the residual, in this order, and record them.

        An exception leaves all three unchanged; the weight to rounding, where it has several matrices.

        Args:
            factors: A and B of each matrix, in values that ``dtype`` represents.
            began: start of the work on this layer, by ``time.perf_counter()``.
            dtype: of the adapter; by default the weight's.
            residual: W_res as the weight is stored, where another device has computed it.
        """
        weight = self.weight
        before = self.fingerprint()
        # copies on the CPU, which need memory: before the weight is changed
        joined = self.joined(factors)
        kept = self.kept(factors, dtype or weight.dtype, joined)
        with self.restored_on_failure():
            self.set_adapter(*joined)
            if residual is not None:
                weight.copy_(residual)
            else:
                self.subtract(factors)
        return self.record(kept, before, self.fingerprint(), time.perf_counter() - began, weight.dtype)

    def subtract(self, factors: Sequence[Factors], first: int = 0, *, undo: bool = False) -> None:
        """Subtract s·B·A from matrices of the weight, in place. After an exception they are as before, to rounding.

        Args:
            factors: A and B of each.
            first: index of the first of these matrices.
            undo: add s·B·A instead.
        """
        layout, done = self.layout, 0
        scaling = -self.recipe.scaling if undo else self.recipe.scaling
        with exact_arithmetic(self.weight.device), layout.writable(self.weight) as stack:
            pairs = list(zip(stack[first : first + len(factors)], factors, strict=True))
            try:
                for matrix, each in pairs:
                    ops.subtract_lowrank_(matrix, *_on(matrix, each), scaling, self.transposed)
                    done += 1
            except BaseException:
                for matrix, each in pairs[:done]:
                    ops.subtract_lowrank_(matrix, *_on(matrix, each), -scaling, self.transposed)
                raise

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
                copies.append((parameter, part_of(value.to(device, kept, copy=True), parameter)))
        for parameter, copied in copies:
            put_(parameter, copied)

    @contextlib.contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """Context that restores A and B after an exception."""
        before = [values_of(parameter) for parameter in self.layout.factors(self.adapter)]
        try:
            yield
        except BaseException:
            for parameter, value in zip(self.layout.factors(self.adapter), before, strict=True):
                put_(parameter, value)
            raise


def _on(matrix: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """B and A on the device of a matrix."""
    return factors.lora_B.to(matrix.device), factors.lora_A.to(matrix.device)
