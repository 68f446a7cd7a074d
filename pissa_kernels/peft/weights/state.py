"""What the weight of a layer holds, and what its forward pass adds so that every adapter keeps its function.

A LoRA layer computes y = W·x + Σ ΔW_j·x over its active adapters, with ΔW_j = s_j·(B_j·A_j − B_j0·A_j0) for an adapter
with initial factors and s_j·B_j·A_j for any other; so does each of the matrices that a layer may have
(:mod:`pissa_kernels.adapter.layouts`, whose g is part of s here). Stored is W_res = W − Σ s_k·B_k0·A_k0 over the
records that are subtracted. PEFT computes W_res·x + Σ s_j·B_j·A_j·x, so that the correction

    C·x,  C = Σ_subtracted s_k·B_k0·A_k0 − Σ_active s_j·B_j0·A_j0

is missing. It is zero, and costs nothing, while the adapter that was subtracted is the active one.

While adapters are merged, exactly theirs are subtracted, and the stored weight is W + Σ_merged ΔW_j.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...adapter.layers import lora_layers
from ...adapter.layouts import Layout, layout_of
from ...numerics import exact_arithmetic
from ...pissa import subtract_from_blocks_
from ...runtime.shards import is_sharded
from .quantized import is_quantized, matrix_shape, values_of
from .record import InitRecord, records

# Relative size of a coefficient that is round-off: scaling a layer and back may leave the last bit.
NEGLIGIBLE = 2.0**-40
# Attributes of a layer.
TERMS, COPIES = "pissa_terms", "pissa_copies"

Factors = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Terms:
    """The records of one layer, grouped by their factors.

    Attributes:
        factors: A₀ and B₀ of each group, as they are recorded.
        subtracted: of each group, the sum of the scalings with which it is subtracted while nothing is merged.
        groups: index of the group of each adapter with initial factors.
        scalings: the scaling that each of these adapters was recorded with.
        negligible: size below which a coefficient is round-off.
    """

    factors: list[Factors] = field(default_factory=list)
    subtracted: list[float] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)
    negligible: float = 0.0

    @classmethod
    def of(cls, kept: Sequence[InitRecord]) -> Terms:
        """Terms of a layer's records."""
        terms = cls()
        for record in kept:
            index = next((i for i, (A, _) in enumerate(terms.factors) if A is record.lora_A), None)
            if index is None:
                index = len(terms.factors)
                terms.factors.append((record.lora_A, record.lora_B))
                terms.subtracted.append(0.0)
            scaling = record.report.scaling
            terms.subtracted[index] += 0.0 if record.shared else scaling
            terms.groups[record.adapter], terms.scalings[record.adapter] = index, scaling
            terms.negligible = max(terms.negligible, NEGLIGIBLE * scaling)
        return terms

    def missing(self, active: Sequence[str], scaling: Mapping[str, Any]) -> list[Any]:
        """Coefficient of B₀·A₀ of each group in C; 0.0 where it is negligible.

        Args:
            active: the adapters that the forward pass adds, or that are merged.
            scaling: the current scalings g·s; PEFT makes tensors of them for compiled hotswapping.
        """
        totals: list[Any] = list(self.subtracted)
        for name in active:
            if name in self.groups:
                totals[self.groups[name]] = totals[self.groups[name]] - scaling[name]
        return [0.0 if not isinstance(total, Tensor) and abs(total) <= self.negligible else total for total in totals]

    def is_own(self, name: str, subtracted: Sequence[float]) -> bool:
        """Whether what is subtracted is the initial term of one adapter and no other; nothing for a plain LoRA."""
        left = list(subtracted)
        if name in self.groups:
            left[self.groups[name]] -= self.scalings[name]
        return all(abs(total) <= self.negligible for total in left)


def terms(layer: Any) -> Terms:
    """Terms of a layer; empty where it has no records."""
    found: Terms | None = layer.__dict__.get(TERMS)
    return found if found is not None else Terms.of(records(layer))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model that have initial factors, with their names."""
    return ((name, layer) for name, layer in lora_layers(model) if records(layer))


def variant_name(layer: Any, adapter: str) -> str:
    """What a variant of LoRA is called: "Dora" for PEFT's ``DoraLinearVariant``."""
    name = type(layer.lora_variant[adapter]).__name__
    return name.removesuffix("Variant").removesuffix("Linear")


def label(layer: Any) -> str:
    """A layer in messages, by the name that its initialization had."""
    kept = records(layer)
    return label_of(layer, kept[0].report.name if kept else None)


def label_of(layer: Any, name: str | None) -> str:
    """A layer in messages; without a name, by its class."""
    layout = layout_of(layer)
    known = f"layer {name!r}" if name else f"a {type(layout.module).__name__} layer"
    return f"{known}, weight {stored_shape(layer)}"


def stored_shape(layer: Any) -> tuple[int, ...]:
    """Shape of the weight of a layer as it is stored, before it is packed."""
    layout = layout_of(layer)
    return matrix_shape(layout.module) if is_quantized(layout.module) else tuple(layout.weight.shape)


def values(layer: Any) -> Tensor:
    """The weight that the base module of a layer computes with: its parameter, or the dequantized values."""
    layout = layout_of(layer)
    if is_quantized(layout.module):
        return values_of(layout.module)
    weight: Tensor = layout.weight.detach()
    return weight


def weight_of(layer: Any, record: InitRecord | None) -> Tensor:
    """The weight of an unmerged layer with the initial term of one record subtracted and no other; None for W.

    Normally that is the stored weight, which is returned itself. It is not where another adapter's is subtracted. A
    quantized weight is dequantized, and W is W − E then, with E of :class:`pissa_kernels.report.Quantization`.

    Args:
        layer: the layer.
        record: one of its records, or one from a file.
    """
    weight = values(layer)
    found = terms(layer)
    factors, coefficients = list(found.factors), list(found.subtracted)
    if record is not None:
        given = (record.lora_A, record.lora_B)
        index = next((i for i, pair in enumerate(factors) if all(map(_identical, pair, given))), len(factors))
        factors, coefficients = [*factors, given], [*coefficients, 0.0]
        coefficients[index] -= record.report.scaling
    if all(abs(coefficient) <= found.negligible for coefficient in coefficients):
        return weight
    total = weight.clone(memory_format=torch.preserve_format)
    add_(total, factors, coefficients, layout_of(layer))
    return total


def check_own(layer: Any, record: InitRecord | None) -> None:
    """Refuse to make the residual of one record of a quantized weight, or W without one, if it is not that already.

    Raises:
        ValueError: with the name of the layer.
    """
    found = terms(layer)
    left = list(found.subtracted)
    if record is not None:
        left[found.groups[record.adapter]] -= record.report.scaling
    _check_requantized(layer, left)


def _check_requantized(layer: Any, change: Sequence[float]) -> None:
    if any(abs(total) > terms(layer).negligible for total in change):
        raise ValueError(
            f"{label(layer)}: the quantized weight is a residual, to change which would quantize it again, and the "
            "weight before it is not kept. Load the model again; or, for unload() to keep the residual, set "
            "init_lora_weights=True in the adapter's config; or merge the adapter (merge_and_unload)"
        )


def _identical(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def add_(weight: Tensor, factors: Sequence[Factors], coefficients: Sequence[float], layout: Layout) -> None:
    """W += Σ c·B₀·A₀ in place, rounded once.

    Args:
        weight: as it is stored; of a ``DTensor``, the part that this process holds is changed.
        factors: A₀ and B₀ of each term, as PEFT stores them.
        coefficients: c of each term.
        layout: of the layer.
    """
    terms = _summed(weight, factors, coefficients, layout)
    if terms is None:
        return
    if is_sharded(weight):
        held = layout.sharded(weight, weight.to_local())  # type: ignore[attr-defined]
        subtract_from_blocks_(held, *terms, -1.0, layout.transposed)
        return
    A, B = terms
    with exact_arithmetic(weight.device), layout.writable(weight) as stack:
        for matrix, left, right in zip(stack, B, A, strict=True):
            if weight.dtype in ops.WEIGHT_DTYPES:
                ops.subtract_lowrank_(matrix, left, right, -1.0, layout.transposed)
            else:
                matrix += (left @ right).mT if layout.transposed else left @ right


def _summed(
    weight: Tensor, factors: Sequence[Factors], coefficients: Sequence[float], layout: Layout
) -> Factors | None:
    """Σ c·B₀·A₀ as one product, A (P, k, in) and B (P, out, k); None where there is no term."""
    used = [(A, B, c) for (A, B), c in zip(factors, coefficients, strict=True) if c]
    if not used:
        return None
    wide = torch.promote_types(weight.dtype, torch.float32)
    pairs = [layout.split(A.to(weight.device, wide), c * B.to(weight.device, wide)) for A, B, c in used]
    return torch.cat([A for A, _ in pairs], dim=1).contiguous(), torch.cat([B for _, B in pairs], dim=2).contiguous()


def without_initial(weight: Any, layer: Any) -> Tensor:
    """W of a layer with a sharded residual: the part that this process holds, in memory of its own."""
    local: Tensor = weight.to_local().clone()
    found, layout = terms(layer), layout_of(layer)
    product = _summed(weight, found.factors, found.subtracted, layout)
    if product is not None:
        subtract_from_blocks_(layout.sharded(weight, local), *product, -1.0, layout.transposed)
    return local


def rebase_(layer: Any, subtracted: Sequence[float]) -> None:
    """Change what is subtracted from the stored weight of an unmerged layer.

    Args:
        layer: a layer with records.
        subtracted: new sum of the scalings of each group; the records are not changed.

    Raises:
        ValueError: the weight is quantized, and would be quantized again.
    """
    found = terms(layer)
    change = [now - then for now, then in zip(found.subtracted, subtracted, strict=True)]
    layout = layout_of(layer)
    if is_quantized(layout.module):
        _check_requantized(layer, change)
        return
    add_(layout.weight.data, found.factors, change, layout)
