"""What the weight of a layer holds, and what its forward pass adds so that every adapter keeps its function.

A LoRA layer computes y = W·x + Σ ΔW_j·x over its active adapters, with ΔW_j = s_j·(B_j·A_j − B_j0·A_j0) for an adapter
with initial factors and s_j·B_j·A_j for any other. Stored is W_res = W − Σ s_k·B_k0·A_k0 over the records that are
subtracted. PEFT computes W_res·x + Σ s_j·B_j·A_j·x, so that the correction

    C·x,  C = Σ_subtracted s_k·B_k0·A_k0 − Σ_active s_j·B_j0·A_j0

is missing. It is zero, and costs nothing, while the adapter that was subtracted is the active one.

While adapters are merged, exactly theirs are subtracted, and the stored weight is W + Σ_merged ΔW_j.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..adapter.layers import lora_layers
from ..numerics import exact_arithmetic
from .record import InitRecord, fingerprint, forgotten, matches, places_on, records, set_records
from .record import remember as record_of_layer

# Relative size of a coefficient that is round-off: scaling a layer and back may leave the last bit.
NEGLIGIBLE = 2.0**-40
_TERMS, _COPIES = "pissa_terms", "pissa_copies"

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

    def missing(self, active: Sequence[str], scaling: dict[str, Any]) -> list[Any]:
        """Coefficient of B₀·A₀ of each group in C; 0.0 where it is negligible.

        Args:
            active: the adapters that the forward pass adds, or that are merged.
            scaling: the current scalings; PEFT makes tensors of them for compiled hotswapping.
        """
        totals: list[Any] = list(self.subtracted)
        for name in active:
            if name in self.groups:
                totals[self.groups[name]] = totals[self.groups[name]] - scaling[name]
        return [0.0 if not isinstance(total, Tensor) and abs(total) <= self.negligible else total for total in totals]


class DeviceCopies:
    """Initial factors on the devices that have needed them, in their own dtype. Neither copied nor pickled."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, list[Factors]] = {}

    def __reduce__(self) -> Any:
        return DeviceCopies, ()


def is_attached(layer: Any) -> bool:
    """Whether the forward passes of a layer use its records."""
    return any(hook is correct for hook in layer._forward_hooks.values())


def attach(layer: Any) -> bool:
    """Prepare a layer that has records for its forward passes.

    Returns:
        Whether the layer had no hook before.
    """
    layer.__dict__[_TERMS], layer.__dict__[_COPIES] = Terms.of(records(layer)), DeviceCopies()
    if is_attached(layer):
        return False
    layer.register_forward_hook(correct, with_kwargs=True)
    return True


def terms(layer: Any) -> Terms:
    """Terms of a layer; empty where it has no records."""
    found: Terms | None = layer.__dict__.get(_TERMS)
    return found if found is not None else Terms.of(records(layer))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model that have initial factors, with their names."""
    return ((name, layer) for name, layer in lora_layers(model) if records(layer))


def correct(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """Forward hook of a LoRA layer: y + C·x."""
    found: Terms = layer.pissa_terms
    names = kwargs.get("adapter_names")
    x = args[0] if args else kwargs["x"]
    if layer.disable_adapters:
        coefficients = found.missing((), layer.scaling)
        active: Sequence[str] = ()
    elif names is not None:
        return _correct_samples(layer, found, x, output, names)
    elif layer.merged:
        return None
    else:
        active = layer.active_adapters
        coefficients = found.missing(active, layer.scaling)
    used = [index for index, total in enumerate(coefficients) if isinstance(total, Tensor) or total]
    if not used:
        return None
    _refuse_variants(layer, active)
    return _added(layer, x, output, [(index, coefficients[index]) for index in used])


def _correct_samples(layer: Any, found: Terms, x: Tensor, output: Tensor, names: list[str]) -> Tensor | None:
    """The hook for a batch in which every sample has its own adapter; "__base__" is none."""
    of_name = {name: found.missing((name,) if name in layer.lora_A else (), layer.scaling) for name in set(names)}
    for name, totals in of_name.items():
        if any(isinstance(total, Tensor) or total for total in totals):
            _refuse_variants(layer, [name])
    shape = (len(names),) + (1,) * (output.ndim - 1)
    terms = []
    for index in range(len(found.factors)):
        column = [float(of_name[name][index]) for name in names]
        if any(column):
            terms.append((index, torch.tensor(column, device=output.device).view(shape)))
    return _added(layer, x, output, terms) if terms else None


def _added(layer: Any, x: Tensor, output: Tensor, terms: Sequence[tuple[int, Any]]) -> Tensor:
    factors = layer.pissa_copies.by_device.get(output.device)
    if factors is None:
        factors = _copy_to(layer, output.device)
    wide = torch.promote_types(output.dtype, torch.float32)
    with torch.autocast(output.device.type, enabled=False):
        total, x = output.to(wide), x.to(output.device, wide)
        for index, coefficient in terms:
            A, B = factors[index]
            total = total + coefficient * nn.functional.linear(nn.functional.linear(x, A.to(wide)), B.to(wide))
    return total.to(output.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _copy_to(layer: Any, device: torch.device) -> list[Factors]:
    with torch.inference_mode(False):  # its tensors cannot be used in a forward pass that records a graph
        copies = [(A.to(device), B.to(device)) for A, B in layer.pissa_terms.factors]
    layer.pissa_copies.by_device[device] = copies
    return copies


def _refuse_variants(layer: Any, active: Sequence[str]) -> None:
    variants = [name for name in active if name in layer.lora_variant]
    if variants:
        raise ValueError(
            f"{label(layer)}: the adapter {variants[0]!r} ({variant_name(layer, variants[0])}) computes with the "
            "stored weight, which is the residual of another adapter here. Activate it alone, in a model of its own"
        )


def variant_name(layer: Any, adapter: str) -> str:
    """What a variant of LoRA is called: "Dora" for PEFT's ``DoraLinearVariant``."""
    name = type(layer.lora_variant[adapter]).__name__
    return name.removesuffix("Variant").removesuffix("Linear")


def label(layer: Any) -> str:
    """A layer in messages, by the name that its initialization had."""
    kept = records(layer)
    weight = layer.get_base_layer().weight
    name = f"layer {kept[0].report.name!r}" if kept else f"a {type(layer.get_base_layer()).__name__} layer"
    return f"{name}, weight {tuple(weight.shape)}"


def original_weight(layer: Any) -> Tensor:
    """W of an unmerged layer, in the shape, dtype and layout of the stored weight; a copy."""
    weight: Tensor = layer.get_base_layer().weight.data.clone(memory_format=torch.preserve_format)
    found = terms(layer)
    add_(weight, found.factors, found.subtracted, bool(layer.fan_in_fan_out))
    return weight


def add_(weight: Tensor, factors: Sequence[Factors], coefficients: Sequence[float], transposed: bool) -> None:
    """W += Σ c·B₀·A₀ in place, rounded once.

    Args:
        weight: (out, in), or (in, out) if ``transposed``.
        factors: A₀ and B₀ of each term.
        coefficients: c of each term.
        transposed: whether the weight is stored (in, out).
    """
    used = [(A, B, c) for (A, B), c in zip(factors, coefficients, strict=True) if c]
    if not used:
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    A = torch.cat([A.to(weight.device, wide) for A, _, _ in used])
    B = torch.cat([c * B.to(weight.device, wide) for _, B, c in used], dim=1)
    with exact_arithmetic(weight.device):
        if weight.dtype in ops.WEIGHT_DTYPES:
            ops.subtract_lowrank_(weight, B, A, -1.0, transposed)
        else:
            weight += (B @ A).mT if transposed else B @ A


def sampled(weight: Tensor, factors: Factors, transposed: bool) -> Tensor:
    """Elements of B₀·A₀ at the places of the fingerprint of ``weight``: float64 on the CPU."""
    A, B = (factor.double() for factor in factors)
    places = places_on(torch.empty(weight.shape, device="meta")) if weight.is_meta else places_on(weight).cpu()
    row, column = places // weight.shape[1], places % weight.shape[1]
    out, into = (column, row) if transposed else (row, column)
    return (B[out] * A.mT[into]).sum(dim=1)


def original_fingerprint(layer: Any) -> Tensor:
    """Fingerprint of W of an unmerged layer, from the stored weight and the records; float64."""
    weight, found = layer.get_base_layer().weight, terms(layer)
    total = fingerprint(weight).double()
    for factors, subtracted in zip(found.factors, found.subtracted, strict=True):
        if subtracted:
            total = total + subtracted * sampled(weight, factors, bool(layer.fan_in_fan_out))
    return total


def can_be_compared(layer: Any) -> bool:
    """Whether the stored weight can be held against a fingerprint: not merged, partitioned, sharded or on meta."""
    weight = layer.get_base_layer().weight
    plain = type(weight.data) is Tensor and weight.ndim == 2 and not weight.is_meta and weight.numel() > 0
    return plain and not layer.merged


def is_known(layer: Any) -> bool:
    """Whether the stored weight is what the records say, as far as it can be compared."""
    kept = records(layer)
    if not kept or not can_be_compared(layer):
        return True
    return is_original(layer, kept[0])


def is_original(layer: Any, record: InitRecord) -> bool:
    """Whether W of an unmerged layer is the weight that a record was taken from."""
    dtypes = (record.report.dtype, layer.get_base_layer().weight.dtype)
    return matches(record.before, original_fingerprint(layer), dtypes, other=record.after)


def check_known(layer: Any) -> None:
    """Refuse a stored weight that is not what the records say.

    Raises:
        ValueError: with the name of the layer.
    """
    if not is_known(layer):
        raise ValueError(
            f"{label(layer)}: the stored weight is no longer the one that PiSSA left here, so the original weight is "
            "not known. Load the model again under patch_peft()"
        )


def rebase_(layer: Any, subtracted: Sequence[float]) -> None:
    """Change what is subtracted from the stored weight of an unmerged layer.

    Args:
        layer: a layer with records.
        subtracted: new sum of the scalings of each group; the records are not changed.
    """
    found = terms(layer)
    change = [now - then for now, then in zip(found.subtracted, subtracted, strict=True)]
    add_(layer.get_base_layer().weight.data, found.factors, change, bool(layer.fan_in_fan_out))


def restore_(layer: Any) -> None:
    """Write W to the stored weight of an unmerged layer, and drop the records."""
    rebase_(layer, [0.0] * len(terms(layer).factors))
    drop(layer)


def drop(layer: Any) -> None:
    """Drop the records of a layer."""
    set_records(layer, [])
    attach(layer)


def remember(layer: Any, record: InitRecord) -> None:
    """Keep a record with its layer, and let the layer's forward passes use it."""
    record_of_layer(layer, record)
    attach(layer)


def forget(layer: Any, adapter: str) -> None:
    """Drop the record of an adapter that is gone; what it has subtracted stays recorded."""
    set_records(layer, forgotten(records(layer), adapter))
    attach(layer)
