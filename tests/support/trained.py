"""Everything that PEFT trains beside A and B, in settings of the adapter, and models that have been trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "dora": ("llama", {"use_dora": True}),
    "dora of Conv1D": ("gpt2", {"use_dora": True}),
    "dora and rslora": ("llama", {"use_dora": True, "use_rslora": True, "lora_alpha": 7}),
    "all biases": ("bert", {"bias": "all"}),
    "all biases of Conv1D": ("gpt2", {"bias": "all"}),
    "biases of layers": ("bert", {"bias": "lora_only"}),
    "biases and dora": ("gpt2", {"bias": "lora_only", "use_dora": True}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "head and embedding": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms": ("bert", {"modules_to_save": ["LayerNorm"], "bias": "all"}),
    "tokens": ("llama", {"trainable_token_indices": [1, 5, 99]}),
    "tokens, tied": ("gpt2", {"trainable_token_indices": [0, 7]}),
    "tokens by name": ("bert", {"trainable_token_indices": {"word_embeddings": [3]}}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding of positions": ("gpt2", {"target_modules": ["c_attn", "wpe"]}),
    "embedding with dora": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "embedding and head": ("llama", {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}),
    "all together": (
        "bert",
        {
            "use_dora": True,
            "bias": "all",
            "modules_to_save": ["pooler"],
            "trainable_token_indices": {"word_embeddings": [3]},
            "target_modules": ["query", "token_type_embeddings"],
        },
    ),
    "tokens and head": ("llama", {"trainable_token_indices": [4], "modules_to_save": ["lm_head"], "use_dora": True}),
    "patterns": ("llama", {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}}),
}


# dtype and name of the adapter
VARIANTS = [
    pytest.param(torch.float32, "default", id="float32"),
    pytest.param(torch.bfloat16, "first", id="bfloat16", marks=pytest.mark.slow),
]


def trained(model: Any) -> Any:
    """The model after every trainable parameter has moved."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.3 * (parameter.detach().float().std() + 0.1) * noise).to(parameter)
    return model


def stored(model: Any, folder: Path) -> Any:
    """The model as transformers loads it: its rotary frequencies are in float32 in every dtype."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=model.dtype).eval()
