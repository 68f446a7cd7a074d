"""Small models of real architectures whose linear weights have the spectrum of a trained weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .reference import realistic

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
}


def build(name: str, dtype: torch.dtype = torch.float32, width: int = 96, layers: int = 2) -> Any:
    """A seeded model: grouped-query attention where the architecture has it, vocabulary 100."""
    import transformers as t

    common = {"num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 100}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    inner = 3 * width
    state = torch.get_rng_state()
    torch.manual_seed(0)
    if name == "gpt2":
        config = t.GPT2Config(
            n_embd=width, n_layer=layers, n_head=4, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=1
        )
        model = t.GPT2LMHeadModel(config)
    elif name == "bert":
        model = t.BertModel(
            t.BertConfig(hidden_size=width, intermediate_size=inner, max_position_embeddings=32, **common)
        )
    else:
        kinds = {"llama": (t.LlamaConfig, t.LlamaForCausalLM), "mistral": (t.MistralConfig, t.MistralForCausalLM)}
        config_class, model_class = kinds[name]
        config = config_class(
            hidden_size=width,
            intermediate_size=inner,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            **common,
            **tokens,
        )
        model = model_class(config)
    torch.set_rng_state(state)
    for index, (_, weight) in enumerate(linear_weights(model, name)):
        shaped = realistic(*weight.shape, seed=index)
        # the scale of trained projections of this width, so that activations neither vanish nor overflow
        weight.data.copy_(shaped * (weight.shape[1] ** -0.5 / shaped.std()))
    return model.to(dtype).eval()


def linear_weights(model: nn.Module, name: str) -> list[tuple[str, torch.Tensor]]:
    """Name and weight, as stored, of every layer that TARGETS names."""
    return [
        (key, module.weight)
        for key, module in model.named_modules()
        if key.rpartition(".")[2] in TARGETS[name] and getattr(module, "weight", None) is not None
    ]


def output(model: Any, length: int = 12) -> torch.Tensor:
    """Logits or last hidden state of two rows of tokens, in float64."""
    ids = torch.arange(2 * length).reshape(2, length) % 100
    with torch.no_grad():
        result = model(input_ids=ids)
    tensor: torch.Tensor = result.logits if "logits" in result else result.last_hidden_state
    return tensor.double()
