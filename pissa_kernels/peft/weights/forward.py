"""The forward pass of a layer with initial factors: a permanent hook adds the correction C·x to PEFT's output.

:mod:`pissa_kernels.peft.weights.state` defines C. A pass without a correction computes what PEFT computes, and nothing
more. A module whose adapter is not added to its output computes with W_res + C instead
(:mod:`pissa_kernels.peft.weights.substitute`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...adapter.layouts import layout_of
from . import known, state, substitute
from .awaited import check_awaited, mark, settle
from .first_pass import watch
from .record import InitRecord, fingerprint, forgotten, matches, records, set_records
from .record import remember as keep
from .state import COPIES, TERMS, Factors, Terms, label, variant_name
from .tensor_parallel import divided_product, plan_of


class DeviceCopies:
    """Initial factors on the devices that have needed them, in their own dtype. Neither copied nor pickled."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, list[Factors]] = {}

    def __reduce__(self) -> Any:
        return DeviceCopies, ()


def is_attached(layer: Any) -> bool:
    """Whether the forward passes of a layer use its records."""
    return any(hook in (correct, substitute.leave) for hook in layer._forward_hooks.values())


def attach(layer: Any) -> bool:
    """Prepare a layer that has records for its forward passes.

    Returns:
        Whether the layer had no hook before.
    """
    layer.__dict__[TERMS], layer.__dict__[COPIES] = Terms.of(records(layer)), DeviceCopies()
    for record in records(layer):
        settle(layer, record.adapter)
    if is_attached(layer):
        return False
    if layout_of(layer).by_output:
        layer.register_forward_hook(correct, with_kwargs=True)
    else:
        substitute.attach(layer)
    return True


def await_record(layer: Any, adapter: str, shown: str) -> None:
    """Refuse passes without an adapter whose initial factors are not known in this process, until they are.

    Args:
        layer: the layer.
        adapter: name of the adapter.
        shown: the layer in messages.
    """
    mark(layer, adapter, shown)
    attach(layer)


def correct(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """Forward hook of a LoRA layer: y + C·x."""
    found: Terms = layer.pissa_terms
    names = kwargs.get("adapter_names")
    x = args[0] if args else kwargs["x"]
    if layer.disable_adapters:
        coefficients = found.missing((), layer.scaling)
        active: Sequence[str] = ()
    elif names is not None:
        for name in set(names):
            check_awaited(layer, [name])
        return _correct_samples(layer, found, x, output, names)
    elif layer.merged:
        return None
    else:
        active = layer.active_adapters
        coefficients = found.missing(active, layer.scaling)
    check_awaited(layer, active)
    used = [index for index, total in enumerate(coefficients) if isinstance(total, Tensor) or total]
    if layer.lora_variant:
        _check_variants(layer, found, active, corrected=bool(used))
    if not used:
        return None
    return _added(layer, x, output, [(index, coefficients[index]) for index in used])


def _correct_samples(layer: Any, found: Terms, x: Tensor, output: Tensor, names: list[str]) -> Tensor | None:
    """The hook for a batch in which every sample has its own adapter; "__base__" is none."""
    adapters = layout_of(layer).adapters
    of_name = {name: found.missing((name,) if name in adapters else (), layer.scaling) for name in set(names)}
    for name, totals in of_name.items():
        used = any(isinstance(total, Tensor) or total for total in totals)
        _check_variants(layer, found, [name], corrected=used)
    shape = (len(names),) + (1,) * (output.ndim - 1)
    terms = []
    for index in range(len(found.factors)):
        column = [float(of_name[name][index]) for name in names]
        if any(column):
            terms.append((index, torch.tensor(column, device=output.device).view(shape)))
    return _added(layer, x, output, terms) if terms else None


def _added(layer: Any, x: Tensor, output: Tensor, terms: Sequence[tuple[int, Any]]) -> Tensor:
    factors, layout = factors_on(layer, output.device), layout_of(layer)
    wide = torch.promote_types(output.dtype, torch.float32)
    with torch.autocast(output.device.type, enabled=False):
        total, x = output.to(wide), x.to(output.device)
        for index, coefficient in terms:
            A, B = factors[index]
            A, B = A.to(wide), B.to(wide)
            if layout.is_linear and plan_of(layer) is not None:
                product = divided_product(layer, x.to(wide), A, B, output.shape[-1])
            else:
                product = layout.product(x, A, B)
            total = total + coefficient * product
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


def _check_variants(layer: Any, found: Terms, active: Sequence[str], *, corrected: bool) -> None:
    """Refuse a variant that takes norms from the stored weight, unless exactly its own initial term is subtracted.

    Args:
        layer: the layer.
        found: its terms.
        active: the adapters that the pass adds.
        corrected: whether C is not zero. The variant would have to scale C·x as well.
    """
    for name in active:
        if name not in layer.lora_variant:
            continue
        own = found.is_own(name, found.subtracted)
        if own and not corrected:
            continue
        adapter = f"{label(layer)}: the adapter {name!r} ({variant_name(layer, name)})"
        if own and len([other for other in active if other in layout_of(layer).adapters]) == 1:
            raise ValueError(
                f"{adapter} computes with the stored weight, from which its initial factors were subtracted with the "
                f"scaling {found.scalings[name]:g}, and its scaling is {float(layer.scaling[name]):g} now. Set it back "
                f"(set_scale({name!r}, 1) on each layer)"
            )
        raise ValueError(
            f"{adapter} computes with the stored weight, which is not its own here because of another adapter's "
            "initial factors. Activate it alone, in a model of its own"
        )


def remember(layer: Any, record: InitRecord) -> None:
    """Keep a record with its layer, and let the layer's forward passes use it."""
    keep(layer, record)
    attach(layer)
    watch(layer)


def replace_records(layer: Any, kept: Sequence[InitRecord]) -> None:
    """Give a layer other records, and let its forward passes use them."""
    set_records(layer, kept)
    attach(layer)


def forget(layer: Any, adapter: str) -> None:
    """Drop the record of an adapter that is gone; what it has subtracted stays recorded."""
    set_records(layer, forgotten(records(layer), adapter))
    attach(layer)


def adopt(layer: Any, adapter: str) -> None:
    """Take over the records of a bare module that holds a residual, and drop records of a weight that is gone.

    The module was unloaded by PEFT's recipe, which keeps the residual.

    Args:
        layer: the LoRA layer of the module.
        adapter: name of the adapter that it gets.

    Raises:
        ValueError: the stored weight is not what the records say.
    """
    layout = layout_of(layer)
    base, parameter = layout.module, layout.parameter
    if not records(layer):
        if not records(base, parameter):
            return
        set_records(layer, records(base, parameter))
        attach(layer)
    set_records(base, [], parameter)
    if known.is_known(layer):
        return
    first, weight = records(layer)[0], state.values(layer)
    # the original weight again, loaded over the residual
    replaced = matches(first.before, fingerprint(weight), (first.report.dtype, weight.dtype), other=first.after)
    if replaced and not any(name != adapter for name in layout.adapters):
        drop(layer)
    else:
        known.check_known(layer)


def restore_(layer: Any) -> None:
    """Write W to the stored weight of an unmerged layer, and drop the records."""
    state.rebase_(layer, [0.0] * len(state.terms(layer).factors))
    drop(layer)


def reset(layer: Any, kept: Sequence[InitRecord], attached: bool) -> None:
    """Give a layer the records that it had, and no hook if it had none."""
    set_records(layer, kept)
    attach(layer)
    if not attached:
        _detach(layer)
        del layer.__dict__[TERMS], layer.__dict__[COPIES]


def _detach(layer: Any) -> None:
    for key in [key for key, hook in layer._forward_hooks.items() if hook in (correct, substitute.leave)]:
        del layer._forward_hooks[key]
        layer._forward_hooks_with_kwargs.pop(key, None)
        layer._forward_hooks_always_called.pop(key, None)
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is substitute.enter]:
        del layer._forward_pre_hooks[key]


def drop(layer: Any) -> None:
    """Drop the records of a layer."""
    set_records(layer, [])
    attach(layer)
