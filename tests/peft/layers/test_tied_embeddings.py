"""Tied embeddings under ``ensure_weight_tying``: one residual for both places, and adapters that stay equal."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t

import pissa_kernels as pk

from ...support.models import output
from ...support.reference import energy_deficit, realistic

DTYPES = [torch.float32, torch.bfloat16]
# Relative error of the logits, in the roundoff of the dtype.
ROUNDINGS = 8


@functools.cache
def tied() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    model.model.embed_tokens.weight.data = realistic(100, 48).float()
    return model.eval()


def build(dtype: torch.dtype = torch.float32) -> Any:
    return copy.deepcopy(tied()).to(dtype)


def config(**changes: Any) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    return peft.LoraConfig(**(settings | {"init_lora_weights": "pissa"} | changes))


def adapted(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    with pk.patch_peft() as report:
        model = peft.get_peft_model(build(dtype), config(**changes)).eval()
    return model, report


def off(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Relative distance, in roundoffs of the dtype."""
    return float((found - expected).norm() / expected.norm()) / (torch.finfo(dtype).eps / 2)


def train(model: Any, rate: float = 0.5) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_residual_serves_both_places(dtype: torch.dtype) -> None:
    expected, W = output(build(dtype)), build(dtype).lm_head.weight.detach().double()
    model, report = adapted(dtype)
    names = [layer.name for layer in report.layers]
    assert {"model.embed_tokens", "lm_head"} <= set(names)
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    assert embedding.base_layer.weight is head.base_layer.weight
    A, B = head.lora_A["default"].weight.detach(), head.lora_B["default"].weight.detach()
    assert torch.equal(A, embedding.lora_embedding_B["default"].mT)
    assert torch.equal(B, embedding.lora_embedding_A["default"].mT)
    sigma = torch.linalg.svdvals(W)
    assert energy_deficit(W, A) <= (1e-6 if dtype == torch.float32 else 2.5e-6)
    assert float((W - head.base_layer.weight.double() - 2 * B.double() @ A.double()).norm() / sigma.norm()) <= (
        torch.finfo(dtype).eps
    )
    assert off(output(model), expected, dtype) <= ROUNDINGS


def test_the_factors_share_their_memory_and_train_together() -> None:
    """As PEFT shares them in float32."""
    model, _ = adapted()
    start = output(model)
    train(model)
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    assert head.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()
    assert torch.equal(head.lora_B["default"].weight, embedding.lora_embedding_A["default"].mT)
    assert off(output(model), start) > 1e4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_original_is_known_and_a_saved_adapter_loads(dtype: torch.dtype, tmp_path: Path) -> None:
    base = build(dtype)
    expected = output(base)
    model, _ = adapted(dtype)
    train(model)
    trained = output(model)
    with pk.original_model(model):
        assert off(output(model), expected, dtype) <= ROUNDINGS
    model.save_pretrained(tmp_path / "trained")
    with pk.patch_peft() as report:
        again = peft.PeftModel.from_pretrained(base, tmp_path / "trained").eval()
    assert len(report.layers) == 4
    assert torch.equal(output(again), trained)
    pk.save_pissa(model, tmp_path / "residual")
    residual = t.AutoModelForCausalLM.from_pretrained(tmp_path / "residual", dtype=dtype).eval()
    initial = peft.PeftModel.from_pretrained(residual, tmp_path / "residual" / "pissa_init").eval()
    assert off(output(initial), expected, dtype) <= ROUNDINGS


def test_a_second_adapter_and_its_end() -> None:
    expected = output(build())
    model, _ = adapted()
    train(model)
    trained = output(model)
    with pk.patch_peft():
        model.add_adapter("second", config(r=2))
    assert torch.equal(output(model), trained)
    model.set_adapter("second")
    assert off(output(model), expected) <= ROUNDINGS
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(output(model), trained)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload", "unload"])
def test_a_merge_of_both_adapters_into_one_weight_is_refused(method: str) -> None:
    """PEFT would add the change twice."""
    model, _ = adapted()
    train(model)
    trained = output(model)
    with pytest.raises(ValueError, match=r"^layer 'lm_head': it shares its weight with 'model\.embed_tokens'"):
        getattr(model, method)()
    assert torch.equal(output(model), trained)


def test_other_settings_for_the_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^layer 'lm_head', weight .* not its rank or alpha"), pk.patch_peft():
        peft.get_peft_model(build(), config(alpha_pattern={"lm_head": 2}))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_without_the_option_a_tied_weight_is_refused(target: str) -> None:
    base = build()
    before = output(base)
    settings = config(target_modules=[target, "q_proj"], ensure_weight_tying=False)
    with pytest.raises(ValueError, match=rf"{target}', .* is tied to .*ensure_weight_tying=True"), pk.patch_peft():
        peft.get_peft_model(base, settings)
    assert torch.equal(output(base), before)
