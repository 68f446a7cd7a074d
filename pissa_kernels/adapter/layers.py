"""The LoRA layers of a PEFT model, and which of them this package initializes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .names import module_name


def lora_layers(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every LoRA layer of a PEFT model, with its name in the base model."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            yield module_name(name), module


def in_scope(layer: Any, target: nn.Module | None = None) -> bool:
    """Whether ``pissa_init`` handles a LoRA layer. PEFT's own initializer, or a previous patch, gets all others.

    In scope is a weight that one module owns; those that are not plain matrices are refused with a reason. Out of scope
    are ``target_parameters`` and fused experts, Megatron's tensor-parallel layers, and the output projection of an
    ``nn.MultiheadAttention``, which PEFT wraps before it wraps the attention itself.

    Args:
        layer: a ``LoraLayer``.
        target: the module that PEFT replaces; None where it is not known.
    """
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
    from peft.tuners.lora.tp_layer import LoraParallelLinear

    foreign = isinstance(layer, (MultiheadAttention, ParamWrapper, LoraParallelLinear))
    return not foreign and not isinstance(target, nn.MultiheadAttention)
