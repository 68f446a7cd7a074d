"""Trained adapters of small models, and changes to their files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

import pissa_kernels as pk

from ..support.adapted import config, train
from ..support.models import build

Weights = dict[str, torch.Tensor]


def make(
    folder: Path,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    width: int = 64,
    layers: int = 2,
    **changes: Any,
) -> tuple[Any, Any]:
    """Returns the original and the trained model, saved in ``folder`` as base, residual (with pissa_init), trained."""
    base = build(name, dtype, width, layers)
    with pk.patch_peft():
        adapted = peft.get_peft_model(copy.deepcopy(base), config(name, **changes)).eval()
    pk.save_pissa(adapted, folder / "residual")
    train(adapted)
    for key, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in key and "lora_B" not in key:
            parameter.data *= 1.1
    adapted.save_pretrained(folder / "trained")
    base.save_pretrained(folder / "base")
    return base, adapted


def rewrite(folder: Path, **changes: Any) -> None:
    """Change a config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(path: Path, change: Any) -> None:
    """Change the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
