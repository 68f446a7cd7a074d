"""How PEFT computes with the output projection of an ``nn.MultiheadAttention`` that it adapts."""

from __future__ import annotations

import functools

import torch
from torch import nn


@functools.lru_cache(maxsize=1)
def out_proj_count() -> int:
    """How often PEFT adds s·B·A to the weight of ``out_proj``, in its forward pass as in ``merge_and_unload``.

    PEFT 0.21 adds it twice: the attention adds it to the weight, and then has the projection's own layer add it again.
    So the layer computes with W + 2·s·B·A. This is measured on a layer of one element, once in a process, and follows
    another version of PEFT.

    Raises:
        RuntimeError: it is neither 1 nor 2.
    """
    from peft import LoraConfig
    from peft.tuners.lora.layer import MultiheadAttention

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        layer = MultiheadAttention(
            nn.MultiheadAttention(1, 1, dtype=torch.float64), "default", LoraConfig(init_lora_weights=False), r=1
        )
        projection = layer.get_base_layer().out_proj
        projection.lora_A["default"].weight.fill_(1.0)
        projection.lora_B["default"].weight.fill_(1.0)
        before = float(projection.weight)
        layer.merge()
        added = float(projection.get_base_layer().weight) - before
    found = round(added)
    if found not in (1, 2) or abs(added - found) > 1e-9:
        raise RuntimeError(
            f"PEFT adds {added} times s·B·A to the out_proj of nn.MultiheadAttention; accepted are once and twice"
        )
    return found
