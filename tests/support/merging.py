"""Residual checkpoints that stock transformers quantizes, and adapters that stock PEFT trains on them."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.utils.integrations import dequantize_bnb_weight

import pissa_kernels as pk

from .adapted import lora_layers
from .models import build

WIDTH = 64
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}  # fmt: skip


def residual(folder: Path, name: str, rank: int = 4, layers: int = 1) -> Path:
    """Save a bfloat16 model as ``base`` and its residual, with the adapter in pissa_init, as ``residual``."""
    if not (folder / "residual").is_dir():
        model = build(name, torch.bfloat16, WIDTH, layers)
        model.save_pretrained(folder / "base", max_shard_size="60KB")
        pk.init_checkpoint(folder / "base", folder / "residual", rank=rank, progress=False)
    return folder / "residual"


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model of a checkpoint, by transformers alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def quantize(source: Path, out: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Quantize a checkpoint with transformers, and put its pissa_init beside the result.

    Layers in 4 bits dequantize to ``dtype`` in training, and without gradients to the dtype of their inputs.
    """
    settings = transformers.BitsAndBytesConfig(**FORMATS[kind])
    load(source, dtype, quantization_config=settings).save_pretrained(out, max_shard_size="20KB")
    shutil.copytree(source / "pissa_init", out / "pissa_init")
    return out


def in_float32(model: Any) -> Any:
    """A model that computes in float32, with its quantized weights as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.float()
    return model


def adapt(out: Path, adapter: Path) -> Any:
    """The checkpoint with an adapter, by transformers and PEFT alone, in train mode and without dropout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(in_float32(load(out)), adapter, is_trainable=True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def train(model: Any, folder: Path, rate: float = 0.5) -> Path:
    """A few steps, after which the adapter is saved."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def expected(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """W + s·B·A of every adapted layer in float64, as 16-bit checkpoints store it, and a bound on float32's round-off.

    PEFT dequantizes with bitsandbytes.
    """
    found = {}
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        weight = base.weight
        quantized = hasattr(weight, "quant_state") or weight.dtype == torch.int8
        W = dequantize_bnb_weight(weight, state=getattr(base, "state", None)) if quantized else weight.data
        A, B = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
        product, sizes = layer.scaling["default"] * (B @ A), layer.scaling["default"] * (B.abs() @ A.abs())
        if not quantized and layer.fan_in_fan_out:
            product, sizes = product.mT, sizes.mT
        wide = W.detach().double()
        sum_, slack = wide + product, (len(A) + 2) * 2.0**-24 * (wide.abs() + sizes)
        turned = quantized and "gpt2" in model.config.model_type  # Conv1D, which is (out, in) once it is quantized
        found[f"{name}.weight"] = (sum_.mT, slack.mT) if turned else (sum_, slack)
    return found


def worst(model: Any, merged: dict[str, torch.Tensor]) -> float:
    """Largest error of a merged weight relative to one rounding to its dtype; ≤ 1 holds."""
    errors = []
    for key, (reference, slack) in expected(model).items():
        found = merged[key]
        assert found.shape == reference.shape, key
        unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[found.dtype]
        errors.append(float(((found.double() - reference).abs() / (unit * reference.abs() * (1 + unit) + slack)).max()))
    return max(errors)
