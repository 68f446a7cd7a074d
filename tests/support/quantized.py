"""Models that stock transformers quantizes with bitsandbytes, and their weights by bitsandbytes' own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import TARGETS, build

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def saved(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a small model of one layer as transformers saves it."""
    build(architecture, dtype, width=64, layers=1).save_pretrained(folder)
    return folder


def loaded(
    folder: Path, kind: str = "nf4", dtype: torch.dtype = torch.bfloat16, auto: str = "AutoModelForCausalLM"
) -> Any:
    """The model of a folder, quantized by stock transformers. In training mode nothing packs its codes otherwise."""
    import transformers

    quantization = transformers.BitsAndBytesConfig(**FORMATS[kind])
    model = getattr(transformers, auto).from_pretrained(folder, quantization_config=quantization, dtype=dtype)
    return model.train()


def lora(architecture: str = "llama", **options: Any) -> Any:
    """A PiSSA config for :func:`saved`."""
    import peft

    defaults = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS[architecture], "init_lora_weights": "pissa"}
    return peft.LoraConfig(**{**defaults, **options})


def codes(base: Any) -> Tensor:
    """A copy of the codes of a module."""
    return base.weight.data.clone()


def dequantized(base: Any) -> Tensor:
    """The weight (out, in) that a module computes with, float64, by bitsandbytes alone."""
    from bitsandbytes import functional

    weight = base.weight
    if type(weight).__name__ == "Params4bit":
        assert not getattr(weight.quant_state, "packing_format_for_cpu", False)
        return functional.dequantize_4bit(weight.data, weight.quant_state).double()
    scales = weight.SCB if weight.SCB is not None else base.state.SCB
    return weight.data.double() * scales.double()[:, None] / 127


def pack_for_cpu(model: Any) -> int:
    """Pack the 4-bit weights of a model as a forward pass on a CPU with AVX512-BF16 does. Returns their number."""
    from bitsandbytes import functional

    count = 0
    for module in model.modules():
        weight = module._parameters.get("weight")
        if type(weight).__name__ == "Params4bit":
            weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
            count += 1
    return count
