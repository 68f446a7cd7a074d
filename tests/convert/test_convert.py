"""Conversion to a plain LoRA, with which the original model computes what the trained model does."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import pissa_kernels as pk
from pissa_kernels.cli import main as cli
from pissa_kernels.convert.convert import convert_adapter

from ..support.adapted import allowed, config, lora_layers, moved
from ..support.models import build, output
from .adapters import Weights, make, retensor, rewrite

DTYPES = [torch.float32, torch.bfloat16]


def loaded(base: Any, folder: Path) -> Any:
    """The original model with the converted adapter, loaded by PEFT alone."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_the_original_model_with_the_lora_is_the_trained_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapted = make(tmp_path, name, dtype)
    trained = output(adapted)
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")
    model = loaded(base, tmp_path / "lora")
    assert moved(output(base), trained) > 3 * allowed(dtype)
    assert moved(trained, output(model)) <= allowed(dtype)
    assert {layer.name: layer.rank for layer in done.layers} == dict.fromkeys(lora_layers(adapted), 8)
    assert done.loss == 0
    assert done.checked is not None
    assert 0.1 < done.checked <= 1
    assert model.peft_config["default"].init_lora_weights is True
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert not done.notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "residual", "trained"]


PATTERNS = {"rank_pattern": {"q_proj": 6, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"layers.0.*_proj": 10}}
SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "patterns": PATTERNS,
    "rslora and patterns": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True},
    "modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 3, 12])
@pytest.mark.parametrize("setting", SETTINGS)
def test_scalings_and_other_tensors_are_kept(setting: str, rank: int | None, tmp_path: Path) -> None:
    """Rank 12 is twice the highest rank of the patterns, at which the conversion is exact."""
    if rank == 12 and "patterns" not in setting:
        rank = 8
    base, adapted = make(tmp_path, **SETTINGS[setting])
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual/pissa_init", tmp_path / "lora", rank=rank)
    model = loaded(base, tmp_path / "lora")
    before, after = lora_layers(adapted), lora_layers(model)
    for name, layer in before.items():
        full = 2 * layer.r["default"]
        assert after[name].r["default"] == (full if rank is None else min(rank, full))
        assert math.isclose(after[name].scaling["default"], layer.scaling["default"], rel_tol=1e-15)
    if rank == 3:
        assert 0.1 < done.loss < 0.9
    else:
        assert done.loss <= 1e-12
        assert moved(output(adapted), output(model)) <= allowed(torch.float32)
    weights, trained = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "trained"))
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[key], trained[key]) for key in done.carried)
    assert len(done.carried) == {"dora": len(before), "modules": 2}.get(setting, 0)


def test_a_trained_classifier_is_copied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, num_labels=3
    )
    base = transformers.BertForSequenceClassification(small).eval()
    with pk.patch_peft():
        adapted = peft.get_peft_model(copy.deepcopy(base), config("bert", task_type="SEQ_CLS")).eval()
    adapted.save_pretrained(tmp_path / "initial")
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "trained")
    done = convert_adapter(tmp_path / "trained", tmp_path / "initial", tmp_path / "lora")
    assert any("classifier" in key for key in done.carried)
    model = loaded(base, tmp_path / "lora")
    assert moved(output(base), output(adapted)) > 1e-2
    assert moved(output(adapted), output(model)) <= 1e-5


def test_the_sidecar_is_an_initial_adapter(llama: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, adapted = llama
    convert_adapter(folder / "trained", folder / "residual", tmp_path / "one")
    convert_adapter(folder / "trained", folder / "trained", tmp_path / "other")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
    assert moved(output(adapted), output(loaded(base, tmp_path / "other"))) <= allowed(torch.float32)


def test_a_bf16_adapter_is_exact_in_bf16(llama: tuple[Path, Any, Any], copied: Path) -> None:
    def narrow(tensors: Weights) -> None:
        tensors.update({key: value.bfloat16() for key, value in tensors.items()})

    for name in ("trained", "residual/pissa_init"):
        retensor(copied / name / "adapter_model.safetensors", narrow)
    convert_adapter(copied / "trained", copied / "residual", copied / "lora")
    trained, weights = (load_file(copied / name / "adapter_model.safetensors") for name in ("trained", "lora"))
    for key, value in trained.items():
        assert weights[key].dtype == torch.bfloat16
        half = weights[key][:4] if "lora_A" in key else weights[key][:, :4]
        assert torch.equal(half, value)
    convert_adapter(copied / "trained", copied / "residual", copied / "narrow", rank=2)
    assert {value.dtype for value in load_file(copied / "narrow/adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("rank", [None, 3, 8])
def test_an_untrained_adapter_changes_nothing(rank: int | None, llama: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, base, _ = llama
    initial = folder / "residual" / "pissa_init"
    done = convert_adapter(initial, initial, tmp_path / "lora", rank=rank, base="someone/model")
    assert done.loss == 0
    assert {layer.loss for layer in done.layers} == {0}
    assert done.notes[-1].endswith("pissa_init equals its initial adapter, so the result changes nothing")
    assert moved(output(base), output(loaded(base, tmp_path / "lora"))) <= allowed(torch.float32)


# The base model


def test_the_manifest_of_a_residual_checkpoint_names_the_original(tmp_path: Path) -> None:
    base = build("llama", width=64, layers=1)
    base.save_pretrained(tmp_path / "base")
    assert cli.main(["init", str(tmp_path / "base"), str(tmp_path / "residual"), "--rank", "2", "--json"]) == 0
    initial = tmp_path / "residual" / "pissa_init"
    done = convert_adapter(initial, tmp_path / "residual", tmp_path / "lora")
    assert Path(done.base or "").resolve() == (tmp_path / "base").resolve()
    done = convert_adapter(initial, initial, tmp_path / "lora", base=tmp_path / "base", force=True)
    assert done.checked is not None
    assert done.checked <= 1
    manifest = tmp_path / "residual" / "pissa_manifest.json"
    manifest.write_text(manifest.read_text().replace("base", "other"))
    with pytest.raises(ValueError, match=r"pissa_manifest\.json is damaged"):
        convert_adapter(initial, initial, tmp_path / "again")


def test_the_residual_model_is_not_named_as_the_base(copied: Path) -> None:
    def name() -> str | None:
        done = convert_adapter(copied / "trained", copied / "residual", copied / "lora", force=True)
        written = json.loads((copied / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert written == done.base
        assert (written is None) == any("names no base model" in note for note in done.notes)
        return done.base

    rewrite(copied / "trained", base_model_name_or_path="someone/model")
    assert name() == "someone/model"
    rewrite(copied / "trained", base_model_name_or_path=str(copied / "base"))
    assert name() == str(copied / "base")
    rewrite(copied / "trained", base_model_name_or_path=str(copied / "residual"))
    assert name() is None
    rewrite(copied / "trained", base_model_name_or_path=None)
    assert name() is None


@pytest.mark.parametrize("prefix", [("model.", ""), ("", "wrapped.")])
def test_tensor_names_with_and_without_a_prefix(prefix: tuple[str, str], copied: Path) -> None:
    def rename(tensors: Weights) -> None:
        for key in list(tensors):
            tensors[prefix[1] + key.removeprefix(prefix[0])] = tensors.pop(key)

    retensor(copied / "base" / "model.safetensors", rename)
    done = convert_adapter(copied / "trained", copied / "residual", copied / "lora", base=copied / "base")
    assert done.checked is not None
    assert done.checked <= 1


def test_another_base_model_is_refused(copied: Path) -> None:
    key = "model.layers.1.self_attn.q_proj.weight"

    def nudge(tensors: Weights) -> None:
        tensors[key][5, 7] += 1e-4

    retensor(copied / "base" / "model.safetensors", nudge)
    arguments = (copied / "trained", copied / "residual", copied / "lora")
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1\.self_attn\.q_proj': .* times the rounding bound"):
        convert_adapter(*arguments, base=copied / "base")
    with pytest.raises(ValueError, match="times the rounding bound"):
        convert_adapter(*arguments, base=copied / "residual")
    retensor(copied / "base" / "model.safetensors", lambda tensors: tensors.pop(key))
    with pytest.raises(
        ValueError, match=r"q_proj': \S+/base has 0 tensors that could be 'model\.layers\.1\.self_attn\.q_proj"
    ):
        convert_adapter(*arguments, base=copied / "base")
    retensor(copied / "base" / "model.safetensors", lambda tensors: tensors.update({key: torch.zeros(4, 5)}))
    with pytest.raises(ValueError, match=r"has shape \(4, 5\); accepted is \(64, 64\)"):
        convert_adapter(*arguments, base=copied / "base")
    assert sorted(path.name for path in copied.iterdir()) == ["base", "residual", "trained"]


def test_a_note_says_why_the_models_were_not_compared(copied: Path) -> None:
    arguments = (copied / "trained", copied / "trained", copied / "lora")
    done = convert_adapter(*arguments, base="someone/model")
    assert done.checked is None
    assert done.notes == ["not compared with the base model, because someone/model is not a folder"]
    done = convert_adapter(*arguments, base=copied / "base", force=True)
    assert done.checked is None
    assert done.notes[0].endswith("trained is not in a residual checkpoint")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert_adapter(copied / "trained", copied / "residual", copied / "new", base=copied / "nowhere")
