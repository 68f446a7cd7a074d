"""A trained PiSSA adapter converted by ``save_pretrained``, and saved with its sidecar, for all that PEFT trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import pissa_kernels as pk

from ...support.adapted import allowed, config, moved
from ...support.models import build, output
from ...support.trained import SETTINGS, VARIANTS, stored, trained

CONVERTIBLE = {key: value for key, value in SETTINGS.items() if value[1].get("bias", "none") == "none"}


def make(setting: str, dtype: torch.dtype, folder: Path, adapter_name: str = "default") -> tuple[Any, Any]:
    name, changes = SETTINGS[setting]
    base = stored(build(name, dtype), folder / "base")
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base), config(name, **changes), adapter_name=adapter_name)
    return base, trained(model.eval())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize(("dtype", "adapter_name"), VARIANTS)
@pytest.mark.parametrize("setting", CONVERTIBLE)
def test_the_base_model_with_the_converted_adapter_is_the_trained_model(
    setting: str, dtype: torch.dtype, adapter_name: str, tmp_path: Path
) -> None:
    base, model = make(setting, dtype, tmp_path, adapter_name)
    expected = output(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pk.save_pissa(model, tmp_path / "out", adapter_name=adapter_name)
    model.save_pretrained(
        tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "out" / "pissa_init")
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    folder = tmp_path / "lora" / ("" if adapter_name == "default" else adapter_name)
    assert not any("base_layer" in key for key in tensors(folder))
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert moved(expected, output(plain)) <= allowed(dtype)
    with plain.disable_adapter():
        assert torch.equal(output(plain), output(base))


@pytest.mark.parametrize(("dtype", "adapter_name"), VARIANTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_saved_adapter_loads_onto_the_original_model(
    setting: str, dtype: torch.dtype, adapter_name: str, tmp_path: Path
) -> None:
    base, model = make(setting, dtype, tmp_path, adapter_name)
    model.save_pretrained(tmp_path / "trained")
    folder = tmp_path / "trained" / ("" if adapter_name == "default" else adapter_name)
    assert not any(key.endswith("base_layer.weight") for key in tensors(folder))
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused_by_name(bias: str, tmp_path: Path) -> None:
    with pk.patch_peft():
        model = peft.get_peft_model(build("gpt2"), config("gpt2", bias=bias))
    pk.save_pissa(model, tmp_path / "out")
    with pytest.raises(ValueError, match=rf"'default' trains biases \(bias='{bias}'\).* with convert_adapter"):
        model.save_pretrained(
            tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "out" / "pissa_init")
        )
    assert list(model.peft_config) == ["default"]
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("residual_checkpoint", [False, True])
def test_a_head_of_a_changed_vocabulary_is_carried_as_it_was(residual_checkpoint: bool, tmp_path: Path) -> None:
    """New rows of the head are random in every model that is made: the adapter brings them, with no residual."""
    base = stored(build("llama"), tmp_path / "base")
    base.resize_token_embeddings(120)
    initial = tmp_path / "out" / "pissa_init"
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base), config("llama", target_modules=["q_proj", "lm_head"])).eval()
        pk.save_pissa(model, tmp_path / "out")
        if residual_checkpoint:  # whose adapter has no record
            model = peft.PeftModel.from_pretrained(
                type(base).from_pretrained(tmp_path / "out"), initial, is_trainable=True
            ).eval()
            model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trained(model).save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(initial))
    head = tensors(tmp_path / "lora")["base_model.model.lm_head.base_layer.weight"]
    assert moved(base.lm_head.weight, head) <= 1e-6
    torch.manual_seed(7)
    again = type(base).from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(120)
    assert not torch.equal(again.lm_head.weight, base.lm_head.weight)
    plain = peft.PeftModel.from_pretrained(again, tmp_path / "lora").eval()
    assert moved(output(model), output(plain)) <= allowed(torch.float32)


@pytest.mark.parametrize("setting", ["plain", "embedding and head", "tokens and head"])
def test_an_adapter_of_a_residual_checkpoint_is_converted(setting: str, tmp_path: Path) -> None:
    base, model = make(setting, torch.float32, tmp_path)
    initial = tmp_path / "out" / "pissa_init"
    pk.save_pissa(model, tmp_path / "out")
    with pk.patch_peft():
        residual = type(base).from_pretrained(tmp_path / "out")
        model = trained(peft.PeftModel.from_pretrained(residual, initial, is_trainable=True).eval())
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(initial))
    assert not any("base_layer" in key for key in tensors(tmp_path / "lora"))
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert moved(output(model), output(plain)) <= allowed(torch.float32)


def test_what_is_asked_for_is_saved(tmp_path: Path) -> None:
    base, model = make("embedding and head", torch.float32, tmp_path)
    model.save_pretrained(tmp_path / "trained", save_embedding_layers=True)
    assert "base_model.model.lm_head.base_layer.weight" in tensors(tmp_path / "trained")
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "trained").eval()
    assert torch.equal(output(loaded), output(model))


def test_several_adapters_are_saved_in_one_call(tmp_path: Path) -> None:
    _, model = make("embedding and head", torch.float32, tmp_path)
    model.add_adapter("plain", config("llama", init_lora_weights=True, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "both")
    assert "base_model.model.lm_head.base_layer.weight" not in tensors(tmp_path / "both")
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["default", "nowhere"])
    assert not (tmp_path / "none").exists()
