"""The ``out_proj`` of an ``nn.MultiheadAttention``, which has a LoRA layer of its own and is never called."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# Attribute of the LoRA layer of an attention's out_proj.
_IN_ATTENTION = "pissa_in_attention"


def is_projection(layer: Any) -> bool:
    """Whether a layer is that of the ``out_proj`` of an ``nn.MultiheadAttention``, which does not call it."""
    return _IN_ATTENTION in layer.__dict__ or isinstance(layer.get_base_layer(), NonDynamicallyQuantizableLinear)


def mark_projection(attention: Any) -> None:
    """Mark the LoRA layer of the ``out_proj`` inside that of an attention, which may be of another class."""
    attention.get_base_layer().out_proj.__dict__[_IN_ATTENTION] = True


@functools.cache
def projection_gain() -> int:
    """How often PEFT's forward pass of an ``nn.MultiheadAttention`` adds the adapter of its ``out_proj``: measured.

    PEFT 0.21 merges it twice for each pass, once itself and once through the layer of ``out_proj``.
    """
    import peft

    generator = torch.get_rng_state()
    try:
        attention = nn.MultiheadAttention(1, 1, bias=False, dtype=torch.float64, device="cpu")
        config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"], init_lora_weights=False)
        adapted: Any = peft.inject_adapter_in_model(config, nn.Sequential(attention))[0]
    finally:
        torch.set_rng_state(generator)
    output = adapted.base_layer.out_proj
    with torch.no_grad():
        # value 1, weighted by a softmax over one key: the output is out_proj's weight
        adapted.base_layer.in_proj_weight.fill_(1.0)
        output.base_layer.weight.fill_(0.0)
        for layer, value in ((adapted, 0.0), (output, 1.0)):
            layer.lora_A["default"].weight.fill_(value)
            layer.lora_B["default"].weight.fill_(value)
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        return round(float(adapted(one, one, one, need_weights=False)[0]))
