"""Tiny mixtures of experts, each expert with the spectrum of a trained weight. Nothing here calls the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .reference import realistic

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# More than ten, so that the order of their numbers is not that of their names.
EXPERTS = 11


def moe(name: str, dtype: torch.dtype = torch.float32, experts: int = EXPERTS, layers: int = 2) -> Any:
    """A seeded model with stacks of experts: mixtral, qwen3_moe, deepseek_v3 (a dense layer first) or gpt_oss."""
    import transformers as t

    # sides are multiples of 8, as torch's grouped products need them in 16-bit dtypes
    common = {
        "hidden_size": 40, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 100, "num_experts_per_tok": 2, "tie_word_embeddings": False, "pad_token_id": None,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    routed: dict[str, Any] = {"intermediate_size": 64, "moe_intermediate_size": 24}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    state = torch.get_rng_state()
    torch.manual_seed(0)
    if name == "mixtral":
        model: Any = t.MixtralForCausalLM(
            t.MixtralConfig(**common, intermediate_size=24, num_local_experts=experts, head_dim=10)
        )
    elif name == "qwen3_moe":
        model = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**common, **routed, num_experts=experts, head_dim=10))
    elif name == "deepseek_v3":
        groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": experts}
        heads = {"num_key_value_heads": 4}
        model = t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**{**common, **heads}, **routed, **latent, **groups))
    else:
        model = t.GptOssForCausalLM(
            t.GptOssConfig(**common, intermediate_size=24, num_local_experts=experts, head_dim=10)
        )
    torch.set_rng_state(state)
    for index, (_, stack) in enumerate(stacks(model)):
        for number, weight in enumerate(stack.data):
            shaped = realistic(*weight.shape, seed=1000 * index + number)
            weight.copy_(shaped * (0.5 * weight.shape[-1] ** -0.5 / shaped.std()))
    return model.to(dtype).eval()


def stacks(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Every parameter of a model that is a stack of matrices, by name."""
    return [(name, parameter.detach()) for name, parameter in model.named_parameters() if parameter.ndim == 3]


def saved(model: Any, folder: Path, *, fused: bool = False, shard: str = "20KB") -> Path:
    """Save a model with transformers: its experts one by one as its class has them, or as the model has them."""
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=not fused)
    return folder
