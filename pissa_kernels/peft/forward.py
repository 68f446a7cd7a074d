"""The forward pass of a layer with initial factors: a permanent hook adds the correction C·x to PEFT's output.

:mod:`pissa_kernels.peft.state` defines C. A pass without a correction computes what PEFT computes, and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import state
from .record import InitRecord, forgotten, records, set_records
from .record import remember as keep
from .state import COPIES, TERMS, Factors, Terms, label, variant_name


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
    layer.__dict__[TERMS], layer.__dict__[COPIES] = Terms.of(records(layer)), DeviceCopies()
    if is_attached(layer):
        return False
    layer.register_forward_hook(correct, with_kwargs=True)
    return True


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
    factors = factors_on(layer, output.device)
    wide = torch.promote_types(output.dtype, torch.float32)
    with torch.autocast(output.device.type, enabled=False):
        total, x = output.to(wide), x.to(output.device, wide)
        for index, coefficient in terms:
            A, B = factors[index]
            total = total + coefficient * nn.functional.linear(nn.functional.linear(x, A.to(wide)), B.to(wide))
    return total.to(output.dtype)


def factors_on(layer: Any, device: torch.device) -> list[Factors]:
    """A₀ and B₀ of each group of a layer, on a device; kept there, but not by a compiled pass."""
    factors: list[Factors] = layer.pissa_terms.factors
    if device.type == "cpu":
        return factors
    copies: dict[torch.device, list[Factors]] = layer.pissa_copies.by_device
    if torch.compiler.is_compiling():
        kept = copies.get(device)
        return [(A.to(device), B.to(device)) for A, B in factors] if kept is None else kept
    if device not in copies:
        with torch.inference_mode(False):  # its tensors cannot be used in a forward pass that records a graph
            copies[device] = [(A.to(device), B.to(device)) for A, B in factors]
    return copies[device]


def _refuse_variants(layer: Any, active: Sequence[str]) -> None:
    variants = [name for name in active if name in layer.lora_variant]
    if variants:
        raise ValueError(
            f"{label(layer)}: the adapter {variants[0]!r} ({variant_name(layer, variants[0])}) computes with the "
            "stored weight, which is the residual of another adapter here. Activate it alone, in a model of its own"
        )


def remember(layer: Any, record: InitRecord) -> None:
    """Keep a record with its layer, and let the layer's forward passes use it."""
    keep(layer, record)
    attach(layer)


def forget(layer: Any, adapter: str) -> None:
    """Drop the record of an adapter that is gone; what it has subtracted stays recorded."""
    set_records(layer, forgotten(records(layer), adapter))
    attach(layer)


def restore_(layer: Any) -> None:
    """Write W to the stored weight of an unmerged layer, and drop the records."""
    state.rebase_(layer, [0.0] * len(state.terms(layer).factors))
    drop(layer)


def drop(layer: Any) -> None:
    """Drop the records of a layer."""
    set_records(layer, [])
    attach(layer)
