"""Projections that a model stores as one weight: one matrix with one adapter, as in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk

from ...support.architectures import ARCHITECTURES, GROUPED, TEXT, TOKENS, Architecture
from ...support.kinds_models import exact_logits, logits, tolerance
from ...support.kinds_operations import off
from ...support.reference import ROUNDOFF, energy_deficit

WIDE = {"hidden_size": 64, "intermediate_size": 96}
FALCON = {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}

# the model, and for each fused projection its shape (out, in)
MODELS: dict[str, tuple[Architecture, dict[str, tuple[int, int]]]] = {
    # 4 heads of 16, and one head of keys and values
    "falcon": (
        Architecture("FalconForCausalLM", "FalconConfig", {**FALCON, "multi_query": True}),
        {"query_key_value": (96, 64)},
    ),
    # interleaved in 2 groups of 2 queries, a key and a value
    "falcon, grouped": (
        Architecture(
            "FalconForCausalLM", "FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
        ),
        {"query_key_value": (128, 64)},
    ),
    "phi3": (
        Architecture("Phi3ForCausalLM", "Phi3Config", {**GROUPED, **WIDE}),
        {"qkv_proj": (64, 64), "gate_up_proj": (192, 64)},
    ),
    "gpt_neox": (
        Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, **WIDE}),
        {"query_key_value": (192, 64)},
    ),
    "gpt2": (
        Architecture("GPT2LMHeadModel", "GPT2Config", {**ARCHITECTURES["gpt2"].options, "n_embd": 64}),
        {"c_attn": (192, 64)},
    ),
}
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.slow),
]
DEFICIT = {torch.float32: 1e-6, torch.bfloat16: 2.5e-6}

every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def config(name: str, **changes: Any) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa", "target_modules": list(MODELS[name][1])}
    return peft.LoraConfig(**(settings | {"fan_in_fan_out": name == "gpt2"} | changes))


def make(name: str, dtype: torch.dtype, **changes: Any) -> tuple[Any, Any, Any]:
    """The base, the adapted model, and the report."""
    base = MODELS[name][0].build().to(dtype)
    with pk.patch_peft() as report:
        model = peft.get_peft_model(copy.deepcopy(base), config(name, **changes))
    return base, model.eval(), report


def train(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.1 * parameter.detach().float().std() * noise).to(parameter)
    return logits(model)


@every_dtype
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
@every_model
def test_a_fused_projection_is_one_matrix(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    base, model, report = make(name, dtype, **changes)
    entries = {layer.name: layer for layer in report.layers}
    projections = {key: each for key, each in base.named_modules() if key.rpartition(".")[2] in MODELS[name][1]}
    assert entries.keys() == projections.keys()
    assert len(report.layers) == 2 * len(MODELS[name][1])
    for key, projection in projections.items():
        W = projection.weight.detach().double()
        W = W.mT if name == "gpt2" else W
        layer, lora = entries[key], model.base_model.model.get_submodule(key)
        assert layer.shape == tuple(W.shape) == MODELS[name][1][key.rpartition(".")[2]]
        assert (layer.rank, layer.parts, layer.certificate.converged) == (4, (), True)
        A, B = (part["default"].weight.detach().double() for part in (lora.lora_A, lora.lora_B))
        assert energy_deficit(W, A) <= DEFICIT[dtype]
        product = layer.scaling * B @ A
        kept = lora.get_base_layer().weight.detach().double()
        kept = kept.mT if name == "gpt2" else kept
        arithmetic = 6 * 2**-24 * (W.abs() + layer.scaling * B.abs() @ A.abs())
        assert ((kept - (W - product)).abs() <= ROUNDOFF[dtype] * ((W - product).abs() + arithmetic) + arithmetic).all()
    assert off(exact_logits(base), logits(model)) <= tolerance(base)


@every_model
def test_training_saving_loading_and_conversion(name: str, tmp_path: Path) -> None:
    base, model, _ = make(name, torch.float32)
    expected = train(model)
    assert off(exact_logits(base), expected) > 100 * tolerance(base)
    model.save_pretrained(tmp_path / "trained")
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "trained").eval()
    assert off(expected, logits(loaded)) <= tolerance(base)
    pk.convert_adapter(tmp_path / "trained", tmp_path / "trained", tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain").eval()
    assert off(expected, logits(plain)) <= tolerance(base)
    assert off(expected, logits(model.merge_and_unload())) <= tolerance(base)


@every_model
def test_the_residual_model_loads_without_this_package(name: str, tmp_path: Path) -> None:
    base, model, _ = make(name, torch.float32)
    train(model)
    pk.save_pissa(model, tmp_path / "out")
    residual = type(base).from_pretrained(tmp_path / "out").eval()
    loaded = peft.PeftModel.from_pretrained(residual, tmp_path / "out" / "pissa_init").eval()
    assert off(exact_logits(base), logits(loaded)) <= tolerance(base)
