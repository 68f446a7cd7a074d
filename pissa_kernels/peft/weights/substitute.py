"""Layers whose adapter PEFT adds to the weight during a forward pass: stacks of experts, and ``nn.MultiheadAttention``.

Hooks put W_res + C in the place of the stored weight before a pass that needs it, with C as in
:mod:`pissa_kernels.peft.weights.state`, and the stored parameter itself back afterwards. So nothing is added to it and
subtracted again, which would round it at every pass, as PEFT does with the weights of an attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter.attention import is_projection
from ...adapter.layouts import Layout, layout_of
from ...runtime.shards import is_sharded
from . import state
from .awaited import check_awaited
from .state import TERMS, Terms

# Stack of what running passes of a layer have put aside; a pass may be inside another one.
_ENTERED = "pissa_entered"
# Methods that the guard of a layer replaces, and that a pass of PEFT uses for itself.
_OF_PEFT = ("merge", "unmerge")


def attach(layer: Any) -> None:
    """Register the hooks."""
    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave, always_call=True)


def enter(layer: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: let the module compute with W_res + C."""
    if layer.merged and layer.disable_adapters:
        layer.unmerge()  # as PEFT would do in the pass
    put_aside: list[_PutAside] = []
    layer.__dict__.setdefault(_ENTERED, []).append(put_aside)
    if layer.merged:
        return
    for each in _computed_by(layer):
        layout, found = layout_of(each), each.__dict__.get(TERMS) or Terms()
        active = () if each.disable_adapters else each.active_adapters
        check_awaited(each, active)
        coefficients = found.missing(active, layout.scalings)
        is_corrected = any(isinstance(total, Tensor) or total for total in coefficients)
        # PEFT adds to the weights of an attention in every pass, and subtracts it again
        if is_corrected or _is_of_attention(each):
            put_aside.append(_PutAside(each, layout))
        if is_corrected:
            put_aside[-1].substitute(found, coefficients)


def leave(layer: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook, called after a failure too: put the stored parameters back."""
    entered: list[list[_PutAside]] = layer.__dict__.get(_ENTERED, [])
    if entered:
        for each in reversed(entered.pop()):
            each.put_back()


def _computed_by(layer: Any) -> Iterator[Any]:
    """The LoRA layers whose weights a pass of a layer uses."""
    yield layer
    base = layer.get_base_layer()
    if isinstance(base, nn.MultiheadAttention):
        yield base.out_proj


def _is_of_attention(layer: Any) -> bool:
    return is_projection(layer) or isinstance(layer.get_base_layer(), nn.MultiheadAttention)


class _PutAside:
    """The stored parameter of a LoRA layer during one pass, and the guards of its methods."""

    def __init__(self, layer: Any, layout: Layout) -> None:
        self.layer, self.layout, self.module, self.key = layer, layout, layout.module, layout.parameter
        self.parameter: Any = self.module._parameters[self.key]
        self.order = list(self.module._parameters)
        self.guards: dict[str, Any] = {}
        if _is_of_attention(layer):
            self.guards = {name: layer.__dict__.pop(name) for name in _OF_PEFT if name in layer.__dict__}

    def substitute(self, found: Terms, coefficients: Sequence[Any]) -> None:
        """Put W_res + C in the parameter's place."""
        if is_sharded(self.parameter) and hasattr(self.module, "set_reshard_after_forward"):
            raise RuntimeError(
                f"{state.label(self.layer)}: these adapters need another weight in the place of the stored one, before "
                "FSDP2 gathers that of this module. Apply fully_shard to the block around the module instead"
            )
        if self.parameter.is_meta:
            raise RuntimeError(
                f"{state.label(self.layer)}: the weight is not in memory (offloaded), and these adapters need another "
                "one than is stored. Activate the adapter that was initialized first, alone, or load the model without "
                "offload"
            )
        with torch.no_grad():
            weight = self.parameter.detach().clone(memory_format=torch.preserve_format)
            state.add_(weight, found.factors, coefficients, self.layout)
        self.module._parameters[self.key] = nn.Parameter(weight, requires_grad=False)

    def put_back(self) -> None:
        """Put the parameter back, in its place among those of the module."""
        self.module.__dict__.pop(self.key, None)  # PEFT may have made an attribute of it
        self.module._parameters[self.key] = self.parameter
        in_order = {key: self.module._parameters[key] for key in self.order}
        self.module._parameters.clear()
        self.module._parameters.update(in_order)
        self.layer.__dict__.update(self.guards)
