"""The LoRA layers of a PEFT model, and which of them this package initializes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from .names import module_name, own_name


def lora_layers(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every LoRA layer of a PEFT model, with the name of its module in the base model, or of its parameter there.

    The ``out_proj`` of an attention has the name that PEFT gives it, with "base_layer". What FSDP, activation
    checkpointing and ``torch.compile`` add to names is left out (:func:`pissa_kernels.adapter.names.own_name`).
    """
    for name, _, layer in placed_lora_layers(adapted):
        yield name, layer


def placed_lora_layers(adapted: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Every LoRA layer of a PEFT model: its name as in :func:`lora_layers`, that in PEFT's files, and itself."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    wrappers = set()
    for path, module in adapted.named_modules():
        if isinstance(module, ParamWrapper):
            wrappers.add(path)
        if isinstance(module, LoraLayer):
            place = module_name(own_name(path))
            name = module_name(own_name(_without_wrappers(path, wrappers))) if wrappers else place
            yield (f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name), place, module


def _without_wrappers(path: str, wrappers: Collection[str]) -> str:
    """A module's name without the parts that the wrappers of parameters around it have added."""
    parts = path.split(".")
    kept = [part for index, part in enumerate(parts) if part != "base_layer" or ".".join(parts[:index]) not in wrappers]
    return ".".join(kept)


def in_scope(layer: Any) -> bool:
    """Whether ``pissa_init`` handles a LoRA layer. PEFT's own initializer, or a previous patch, gets all others.

    In scope is a weight that one module owns; those that are not floating-point matrices are refused with a reason. Out
    of scope are Megatron's tensor-parallel layers.
    """
    from peft.tuners.lora.tp_layer import LoraParallelLinear

    return not isinstance(layer, LoraParallelLinear)
