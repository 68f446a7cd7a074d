"""A float64 model with the weights W + Σ ΔW_j beside an adapted one: what each of its states should compute."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def layers(adapted: Any) -> dict[str, Any]:
    """The LoRA layers of a model, by their names in the base model."""
    found = {key: module for key, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    return {key.removeprefix("_orig_mod.").removeprefix("base_model.model."): each for key, each in found.items()}


def factors(adapted: Any, adapter: str) -> Pairs:
    """Copies of A and B of an adapter, in float64."""
    return {
        name: tuple(part[adapter].weight.detach().double().clone() for part in (layer.lora_A, layer.lora_B))  # type: ignore[misc]
        for name, layer in layers(adapted).items()
        if adapter in layer.lora_A
    }


class Expected:
    """The base model in float64, and the initial factors of every adapter.

    Args:
        base: the untouched model.
    """

    def __init__(self, base: Any) -> None:
        self.base = copy.deepcopy(base).double()
        self.initial: dict[str, Pairs] = {}

    def made(self, adapted: Any, *adapters: str) -> Any:
        """Note the present values of adapters as their initial ones; those of a plain LoRA multiply to zero."""
        for adapter in adapters or adapted.peft_config:
            self.initial[adapter] = factors(adapted, adapter)
        return adapted

    def model(self, adapted: Any, weights: dict[str, float] | Iterable[str]) -> Any:
        """The base with W + Σ w_j·s_j·(B_j·A_j − B_j0·A_j0), s_j as the layers have it now.

        Args:
            adapted: the adapted model.
            weights: w_j of each adapter, or the adapters, whose w_j are 1.
        """
        wanted = weights if isinstance(weights, dict) else dict.fromkeys(weights, 1.0)
        model = copy.deepcopy(self.base)
        for adapter, weight in wanted.items():
            now = factors(adapted, adapter)
            for name, (A0, B0) in self.initial[adapter].items():
                layer, (A, B) = layers(adapted)[name], now[name]
                change = weight * float(layer.scaling[adapter]) * (B @ A - B0 @ A0)
                model.get_submodule(name).weight.data += change.mT if layer.fan_in_fan_out else change
        return model
