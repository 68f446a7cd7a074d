"""Merged checkpoints compute what the trained model does, and every weight is W + s·B·A to one rounding."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import pissa_kernels as pk

from ..support.adapted import allowed, moved
from ..support.checkpoints import tensors
from ..support.merging import adapt, in_float32, load, quantize, residual, train, worst
from ..support.models import TARGETS, build, output

pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
# int8 layers quantize their inputs too, to 8 bits
INT8_INPUTS = 3e-2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "nf4"), ("gpt2", "nf4"), ("llama", "int8"), ("gpt2", "int8"), ("llama", "fp4")]
)
def test_a_quantized_residual(name: str, kind: str, folders: Path, tmp_path: Path) -> None:
    out = quantize(residual(folders / name, name), tmp_path / "out", kind)
    model = adapt(out, out / "pissa_init")
    before = output(model)
    trained = train(model, tmp_path / "trained")
    report = pk.merge_checkpoint(out, trained, tmp_path / "merged", progress=False)
    base, found = tensors(folders / name / "base"), tensors(tmp_path / "merged")
    assert {key: (value.dtype, value.shape) for key, value in found.items()} == {
        key: (value.dtype, value.shape) for key, value in base.items()
    }
    assert worst(adapt(out, trained), found) <= 1
    adapted = {layer.tensor for layer in report.layers}
    assert all(torch.equal(found[key], base[key]) for key in base if key not in adapted)
    assert {(layer.quantized, layer.dtype, layer.rank) for layer in report.layers} == {(kind, "bfloat16", 4)}
    bound = allowed(torch.bfloat16) if kind != "int8" else INT8_INPUTS
    assert moved(before, output(model)) > 2 * bound
    assert moved(output(model), output(load(tmp_path / "merged"))) <= bound
    assert load(tmp_path / "merged", "auto").dtype == torch.bfloat16


def test_float32_is_exact(folders: Path, tmp_path: Path) -> None:
    """With nothing to round, the logits agree to float32's round-off."""
    out = quantize(residual(folders / "llama", "llama"), tmp_path / "out", "nf4", torch.float32)
    model = adapt(out, out / "pissa_init")
    trained = train(model, tmp_path / "trained")
    pk.merge_checkpoint(out, trained, tmp_path / "merged", workers=2, progress=False)
    found = tensors(tmp_path / "merged")
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert worst(adapt(out, trained), found) <= 1
    merged = load(tmp_path / "merged", "auto")
    assert merged.dtype == torch.float32
    assert moved(output(model), output(merged)) <= 2e-6


@pytest.mark.parametrize("skipped", ["q_proj", "c_proj"])
def test_quantized_layers_without_an_adapter_are_dequantized(skipped: str, folders: Path, tmp_path: Path) -> None:
    """Among them a square ``Conv1D``, whose shape does not tell how it is stored."""
    name = "llama" if skipped == "q_proj" else "gpt2"
    out = quantize(residual(folders / name, name), tmp_path / "out", "nf4", torch.float32)
    targets = [target for target in TARGETS[name] if target != skipped]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    trained = train(peft.get_peft_model(in_float32(load(out)), config).train(), tmp_path / "trained", 2.0)
    report = pk.merge_checkpoint(out, trained, tmp_path / "merged", progress=False)
    assert report.dequantized > len(report.layers)
    assert moved(output(adapt(out, trained)), output(load(tmp_path / "merged"))) <= 2e-6


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_16_bit_residual(name: str, folders: Path, tmp_path: Path) -> None:
    out = residual(folders / name, name)
    model = adapt(out, out / "pissa_init")
    trained = train(model, tmp_path / "trained")
    report = pk.merge_checkpoint(out, trained, tmp_path / "merged", progress=False)
    found, base = tensors(tmp_path / "merged"), tensors(folders / name / "base")
    assert worst(adapt(out, trained), found) <= 1
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in base.items()}
    assert moved(output(model), output(load(tmp_path / "merged"))) <= allowed(torch.bfloat16)
    assert not report.dequantized
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1


def test_the_untrained_adapter_gives_the_original_back(folders: Path, tmp_path: Path) -> None:
    out = residual(folders / "llama", "llama")
    pk.merge_checkpoint(out, out / "pissa_init", tmp_path / "merged", progress=False)
    found, base = tensors(tmp_path / "merged"), tensors(folders / "llama" / "base")
    for key, weight in base.items():
        off = (found[key].double() - weight.double()).abs()
        assert bool((off <= 2.0**-7 * weight.double().abs() + 1e-3).all()), key


def plain_lora(model: Any, folder: Path, **settings: Any) -> Any:
    """A LoRA of PEFT on a checkpoint of ``model``, trained and saved; returns the trained model."""
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings))
    adapted = peft.get_peft_model(copy.deepcopy(model), config).train()
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    train(adapted, folder / "trained", 2.0)
    return adapted


SETTINGS: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}, "use_rslora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "biases": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_plain_lora_as_peft_merges_it(setting: str, tmp_path: Path) -> None:
    settings = {"target_modules": TARGETS["llama"]} | SETTINGS[setting]
    model = build("gpt2" if "fan_in_fan_out" in settings else "llama", torch.float32, 64, 1)
    if "gpt2" in model.config.model_type:  # a head that is not tied is a tensor of its own
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    adapted = plain_lora(model, tmp_path, **settings)
    report = pk.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "merged", progress=False)
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    found, wanted, base = (tensors(tmp_path / name) for name in ("merged", "peft", "base"))
    assert found.keys() == wanted.keys() == base.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-6), key
    changed = {key for key in wanted if not torch.equal(wanted[key], base[key])}
    assert {layer.tensor for layer in report.layers} | set(report.replaced) >= changed
    assert len(changed) > 1


def test_a_bfloat16_checkpoint_as_peft_merges_it(tmp_path: Path) -> None:
    """PEFT rounds s·B·A to bfloat16 and then the sum; here the sum is rounded once."""
    adapted = plain_lora(build("llama", torch.bfloat16, 64, 1), tmp_path, target_modules=TARGETS["llama"])
    pk.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "merged", progress=False)
    found = tensors(tmp_path / "merged")
    assert worst(adapted, found) <= 1
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    for key, value in tensors(tmp_path / "peft").items():
        off = (found[key].double() - value.double()).abs()
        assert bool((off <= 2.0**-7 * value.double().abs() + 1e-4).all()), key


def test_an_adapter_of_the_model_without_its_head(tmp_path: Path) -> None:
    """Its layers lack the prefix of the checkpoint's tensors."""
    model = build("llama", torch.float32, 64, 1)
    model.save_pretrained(tmp_path / "base")
    inner = transformers.AutoModel.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(inner, config)
    adapted.save_pretrained(tmp_path / "trained")
    pk.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "merged", progress=False)
    merged = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        off = merged(ids).last_hidden_state - adapted.eval()(ids).last_hidden_state
    assert float(off.abs().max()) <= 1e-5


def test_the_converted_adapter_merged_into_the_original(folders: Path, tmp_path: Path) -> None:
    """Both ways to the trained model agree: the residual with the adapter, and the original with the plain LoRA."""
    out = residual(folders / "llama", "llama")
    trained = train(adapt(out, out / "pissa_init"), tmp_path / "trained")
    base = folders / "llama" / "base"
    pk.convert_adapter(trained, out, tmp_path / "lora", base=base)
    for first, second, result in ((out, trained, "one"), (base, tmp_path / "lora", "other")):
        pk.merge_checkpoint(first, second, tmp_path / result, dtype="float32", progress=False)
    one, other = (load(tmp_path / result) for result in ("one", "other"))
    assert moved(output(one), output(other)) <= allowed(torch.bfloat16)


def test_an_adapter_inside_the_checkpoint_is_not_copied(folders: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(residual(folders / "llama", "llama"), tmp_path / "out"))
    shutil.copytree(out / "pissa_init", out / "trained")
    pk.merge_checkpoint(out, out / "trained", tmp_path / "merged", progress=False)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in (folders / "llama" / "base").iterdir()}
