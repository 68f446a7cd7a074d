"""``save_pissa`` after training: all that PEFT trains has its initial values, and the base model all its tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import pissa_kernels as pk
from pissa_kernels.peft.start import adapter_state

from ..support.models import build, output
from .test_models import config, lora_layers
from .test_save import DTYPES, allowed, moved

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
    "embedding, tied": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
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


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


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


@pytest.mark.parametrize("adapter_name", ["default", "first"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_initial_state_of_a_trained_model(
    setting: str, dtype: torch.dtype, adapter_name: str, tmp_path: Path
) -> None:
    name, changes = SETTINGS[setting]
    base = stored(build(name, dtype), tmp_path / "base")
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base), config(name, **changes), adapter_name=adapter_name).eval()
    before = {key: value.clone() for key, value in adapter_state(model, adapter_name).items()}
    start = output(model)
    after = {key: value.clone() for key, value in trained(model).state_dict().items()}
    assert moved(output(base), output(model)) > 3 * allowed(dtype)
    pk.save_pissa(model, tmp_path / "out", adapter_name=adapter_name)
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
    residual = type(base).from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert shapes(residual.state_dict()) == shapes(base.state_dict())
    adapted = {f"{layer}.weight" for layer, module in lora_layers(model).items() if module.lora_A}
    for key, value in residual.state_dict().items():
        assert key in adapted or torch.equal(value, base.state_dict()[key]), key
    saved = load_file(tmp_path / "out" / "pissa_init" / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.") for key in saved} == set(before)
    assert all(torch.equal(value, before[key.removeprefix("base_model.model.")]) for key, value in saved.items())
    loaded = peft.PeftModel.from_pretrained(residual, tmp_path / "out", subfolder="pissa_init").eval()
    assert torch.equal(output(loaded), start)
    assert moved(output(base), output(loaded)) <= allowed(dtype)
