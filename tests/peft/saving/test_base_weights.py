"""Adapters whose files hold a base weight, loaded beside a PiSSA adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import pissa_kernels as pk

from ...convert.adapters import retensor
from ...support.adapted import allowed, config, moved
from ...support.models import build, output
from ...support.trained import trained

HEAD = "base_model.model.lm_head.base_layer.weight"


def adapted(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    with pk.patch_peft():
        model = peft.get_peft_model(
            build("llama", dtype), config("llama", target_modules=["q_proj", "lm_head"], **changes)
        )
    return trained(model.eval())


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, save_embedding_layers=True)
    assert HEAD in load_file(folder / "adapter_model.safetensors")
    return folder


def head(model: Any) -> torch.Tensor:
    return model.get_base_model().lm_head.base_layer.weight.detach().clone()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_lora_does_not_replace_the_residual(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT saves the weight of an adapted head by default, and would load it into the model."""
    plain = peft.get_peft_model(
        build("llama", dtype), config("llama", init_lora_weights=True, target_modules=["q_proj", "lm_head"])
    )
    saved(trained(plain.eval()), tmp_path / "plain")
    model = adapted(dtype)
    expected, before = output(model), head(model)
    with pk.patch_peft():
        model.load_adapter(tmp_path / "plain", "plain")
    assert torch.equal(head(model), before)
    assert torch.equal(output(model), expected)


def test_the_residual_in_a_file_is_not_needed(tmp_path: Path) -> None:
    model = adapted(r=8)
    expected = output(model)
    folder = saved(model, tmp_path / "saved")
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(build("llama"), folder).eval()
        assert torch.equal(output(loaded), expected)
        before = head(loaded)
        trained(loaded).load_adapter(folder, "default")
    assert torch.equal(head(loaded), before)
    assert torch.equal(output(loaded), expected)


@pytest.mark.parametrize("existing", [False, True])
def test_a_base_weight_of_another_model_is_refused(existing: bool, tmp_path: Path) -> None:
    model = adapted()
    folder = saved(model, tmp_path / "saved")
    retensor(folder / "adapter_model.safetensors", lambda tensors: tensors[HEAD].mul_(1.01))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with (
        pk.patch_peft(),
        pytest.raises(ValueError, match=r"^layer 'lm_head', weight \(100, 96\): the file has"),
    ):
        model.load_adapter(folder, "default" if existing else "other")
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_base_weights_are_loaded(tmp_path: Path) -> None:
    """The layer has no residual: PEFT's own rule."""
    with pk.patch_peft():
        settings = config("llama", target_modules=["q_proj", "embed_tokens"], init_lora_weights=True)
        model = peft.get_peft_model(build("llama"), settings)
        trained(model.eval()).save_pretrained(tmp_path / "saved", save_embedding_layers=True)
        base = build("llama")
        base.model.embed_tokens.weight.data *= 0.5
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved").eval()
    assert moved(output(model), output(loaded)) <= allowed(torch.float32)


def test_another_embedding_is_refused(tmp_path: Path) -> None:
    """Its adapter was taken from the embedding that the file has, and not from the one of the model."""
    with pk.patch_peft():
        model = peft.get_peft_model(build("llama"), config("llama", target_modules=["q_proj", "embed_tokens"]))
        trained(model.eval()).save_pretrained(tmp_path / "saved", save_embedding_layers=True)
        base = build("llama")
        base.model.embed_tokens.weight.data *= 0.5
        with pytest.raises(ValueError, match=r"^layer 'model\.embed_tokens', weight .* is not the one"):
            peft.PeftModel.from_pretrained(base, tmp_path / "saved")


def test_an_initial_adapter_with_the_residual_converts(tmp_path: Path) -> None:
    """PEFT's recipe, as PEFT saves the initial adapter."""
    with pk.patch_peft():
        model = peft.get_peft_model(build("llama"), config("llama", target_modules=["q_proj", "lm_head"])).eval()
        model.peft_config["default"].init_lora_weights = True
        initial = saved(model, tmp_path / "initial")
        expected = output(trained(model))
        model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(initial))
    assert torch.equal(output(model), expected)
    plain = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "lora").eval()
    assert moved(expected, output(plain)) <= allowed(torch.float32)
