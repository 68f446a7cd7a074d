"""Models with fused experts through the hook: ``target_parameters``, alone and beside ``target_modules``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk

from ...support.architectures import ARCHITECTURES, EXPERTS, Architecture
from ...support.kinds_models import exact_logits, largest_deficit, logits, targets, tolerance
from ...support.kinds_operations import off

LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
MODELS: dict[str, Architecture] = {
    "mixtral": ARCHITECTURES["mixtral"],
    "qwen3_moe": ARCHITECTURES["qwen3_moe"],
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **EXPERTS,
            "num_local_experts": 4,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", {**EXPERTS, **LATENT}),
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = {"deepseek_v3": ["q_a_proj", "o_proj"]}
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.slow),
]
DEFICIT = {torch.float32: 1e-6, torch.bfloat16: 2.5e-6}

every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def attention(name: str) -> list[str]:
    return ATTENTION.get(name, ["q_proj", "v_proj"])


def config(name: str, **changes: Any) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa", "target_parameters": PARAMETERS}
    return peft.LoraConfig(**(settings | {"target_modules": []} | changes))


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return MODELS[name].build().to(dtype)


def adapted(base: Any, settings: peft.LoraConfig) -> tuple[Any, Any]:
    with pk.patch_peft() as report:
        model = peft.get_peft_model(copy.deepcopy(base), settings)
    return model.eval(), report


def stacks(base: Any) -> dict[str, torch.nn.Parameter]:
    """The fused weights, whose names are also those in the report."""
    return {key: value for key, value in base.named_parameters() if key.endswith(tuple(PARAMETERS))}


def train(model: Any) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12)
    parameters = [each for each in model.parameters() if each.requires_grad]
    for _ in range(3):
        logs = model(input_ids=ids).logits.float().log_softmax(-1)
        gradients = torch.autograd.grad(-logs[..., 7].mean(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.02 * parameter.norm() / (gradient.norm() + 1e-30) * gradient
    return logits(model)


@every_dtype
@pytest.mark.parametrize("with_attention", [False, True])
@every_model
def test_the_experts_are_exact_and_the_output_does_not_change(
    name: str, with_attention: bool, dtype: torch.dtype
) -> None:
    base = build(name, dtype)
    names = attention(name) if with_attention else []
    model, report = adapted(base, config(name, target_modules=names))
    linear = {key for key, _ in base.named_modules() if key.rpartition(".")[2] in names}
    assert {layer.name for layer in report.layers} == set(stacks(base)) | linear
    entries = {layer.name: layer for layer in report.layers}
    changes = targets(base, model)
    assert changes.keys() == set(stacks(base)) | {f"{key}.weight" for key in linear}
    for key, change in changes.items():
        assert largest_deficit(base, key, change, 4) <= DEFICIT[dtype], key
    for key, weight in stacks(base).items():
        layer = entries[key]
        assert [part.name for part in layer.parts] == [f"{key}[{index}]" for index in range(4)]
        assert sorted(layer.shape) == sorted(weight.shape[1:])
        assert layer.certificate.converged
        assert layer.dtype == dtype
    assert len(report.summary().splitlines()) == 1
    assert off(exact_logits(base), logits(model)) <= tolerance(base)


@every_dtype
@every_model
def test_training_saving_and_loading(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = build(name, dtype)
    model, _ = adapted(base, config(name, target_modules=attention(name)))
    expected = train(model)
    assert off(exact_logits(base), expected) > 3 * tolerance(base)
    model.save_pretrained(tmp_path)
    with pk.patch_peft() as report:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert report.layers
    assert off(expected, logits(loaded)) <= tolerance(base)
    with pk.original_model(loaded):
        assert off(exact_logits(base), logits(loaded)) <= tolerance(base)
    with model.disable_adapter():
        assert off(exact_logits(base), logits(model)) <= tolerance(base)


@every_dtype
@every_model
def test_merging(name: str, dtype: torch.dtype) -> None:
    base = build(name, dtype)
    model, _ = adapted(base, config(name, target_modules=attention(name)))
    untrained = copy.deepcopy(model).merge_and_unload()
    for key, weight in untrained.state_dict().items():
        exact = base.state_dict()[key].double()
        assert (weight.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm(), key
    expected = train(model)
    model.merge_adapter()
    assert off(expected, logits(model)) <= 2 * tolerance(base)
    model.unmerge_adapter()
    assert off(expected, logits(model)) <= 2 * tolerance(base)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert off(expected, logits(merged)) <= 2 * tolerance(base)


@every_model
def test_the_residual_checkpoint_loads_in_stock_transformers_and_peft(name: str, tmp_path: Path) -> None:
    base = build(name)
    model, _ = adapted(base, config(name, target_modules=attention(name)))
    train(model)
    pk.save_pissa(model, tmp_path / "out")
    residual = type(base).from_pretrained(tmp_path / "out").eval()
    loaded = peft.PeftModel.from_pretrained(residual, tmp_path / "out" / "pissa_init").eval()
    assert off(exact_logits(base), logits(loaded)) <= tolerance(base)


@every_model
def test_conversion_to_a_plain_adapter(name: str, tmp_path: Path) -> None:
    base = build(name)
    model, _ = adapted(base, config(name, target_modules=attention(name)))
    expected = train(model)
    model.save_pretrained(tmp_path / "trained")
    pk.convert_adapter(tmp_path / "trained", tmp_path / "trained", tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain").eval()
    assert off(expected, logits(plain)) <= 2 * tolerance(base)
    with plain.disable_adapter():
        assert torch.equal(logits(plain), logits(base))


@every_model
def test_a_second_adapter(name: str) -> None:
    base = build(name)
    model, _ = adapted(base, config(name))
    first = train(model)
    with pk.patch_peft():
        model.add_adapter("second", config(name, r=2))
    assert off(first, logits(model)) <= tolerance(base)
    model.set_adapter("second")
    assert off(exact_logits(base), logits(model)) <= tolerance(base)
    model.set_adapter("default")
    assert off(first, logits(model)) <= tolerance(base)


@pytest.mark.parametrize(
    ("name", "names"), [("mixtral", ["w1", "w2", "w3", "q_proj"]), ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"])]
)
def test_names_of_projections_that_peft_maps_to_fused_experts(name: str, names: list[str]) -> None:
    """PEFT fuses the targets of older checkpoints, with twice the rank for gate and up together."""
    base = build(name)
    model, report = adapted(base, peft.LoraConfig(r=3, lora_alpha=3, target_modules=names, init_lora_weights="pissa"))
    ranks = {layer.name.rpartition(".")[2]: layer.rank for layer in report.layers}
    assert ranks == {"gate_up_proj": 6, "down_proj": 3} | ({"q_proj": 3} if "q_proj" in names else {})
    for key, change in targets(base, model).items():
        rank = 6 if key.endswith("gate_up_proj") else 3
        assert largest_deficit(base, key, change, rank) <= DEFICIT[torch.float32], key
    assert off(exact_logits(base), logits(model)) <= tolerance(base)


@every_model
def test_all_linear_layers_and_the_experts(name: str) -> None:
    base = build(name)
    model, report = adapted(base, config(name, r=2, lora_alpha=2, target_modules="all-linear"))
    assert set(stacks(base)) <= {layer.name for layer in report.layers}
    assert off(exact_logits(base), logits(model)) <= tolerance(base)
