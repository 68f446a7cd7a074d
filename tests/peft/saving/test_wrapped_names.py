"""Modules that activation checkpointing or torch.compile has wrapped have the names of the base model in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers as layers_of
from pissa_kernels.peft.saving import sidecar
from pissa_kernels.peft.weights.wrappers import all_names, innermost, unwrapped

from ...support.adapted import allowed, config, lora_layers, moved, no_svd, train
from ...support.models import build, output


def checkpointed(model: nn.Module) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")


def compiled(model: Any) -> None:
    """As ``torch.compile`` of each layer leaves it, and of one module inside; nothing is compiled before a pass."""
    layers = _decoder(model).layers
    layers[0].mlp = torch.compile(layers[0].mlp, backend="eager")
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")


def both(model: Any) -> None:
    checkpointed(model)
    layers = _decoder(model).layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")


def _decoder(model: Any) -> Any:
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


WRAPPINGS = {function.__name__: function for function in (checkpointed, compiled, both)}


def made(wrap: Any, *, before: bool = False) -> tuple[Any, Any]:
    base = build("llama")
    model = copy.deepcopy(base)
    if before:
        wrap(model)
    with pk.patch_peft():
        model = peft.get_peft_model(model, config("llama")).eval()
    if not before:
        wrap(model)
    return base, model


@pytest.mark.parametrize("state", ["own", "given"])
@pytest.mark.parametrize("before", [False, True], ids=["wrapped after", "wrapped before"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_model_is_saved_as_the_bare_one(
    wrapping: str, before: bool, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = made(WRAPPINGS[wrapping], before=before)
    train(model)
    names = [name for name, _ in model.named_modules()]
    assert any("_checkpoint_wrapped_module" in name or "_orig_mod" in name for name in names)
    with pk.patch_peft():
        bare = peft.get_peft_model(copy.deepcopy(base), config("llama")).eval()
    train(bare)
    model.save_pretrained(tmp_path / "it", **({"state_dict": model.state_dict()} if state == "given" else {}))
    bare.save_pretrained(tmp_path / "bare")
    assert [name for name, _ in model.named_modules()] == names
    for file in ("adapter_model.safetensors", sidecar.INITIAL_NAME):
        found, expected = (_tensors(tmp_path / folder / file) for folder in ("it", "bare"))
        assert found.keys() == expected.keys()
        assert found
        assert all(torch.equal(found[key], expected[key]) for key in found)
    no_svd(monkeypatch)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "it").eval()
    assert moved(output(bare), output(loaded)) == 0.0


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict


@pytest.mark.parametrize("before", [False, True], ids=["wrapped after", "wrapped before"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_residual_of_a_wrapped_model(wrapping: str, before: bool, tmp_path: Path) -> None:
    base, model = made(WRAPPINGS[wrapping], before=before)
    train(model)
    pk.save_pissa(model, tmp_path / "out")
    report = pk.Report.read(tmp_path / "out" / "pissa_init" / "pissa_report.json")
    assert {layer.name for layer in report.layers} == _projections(base)
    loaded = type(base).from_pretrained(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "out" / "pissa_init").eval()
    assert moved(output(base), output(loaded)) <= allowed(torch.float32)


def _projections(base: nn.Module) -> set[str]:
    return {name for name, _ in base.named_modules() if name.endswith("_proj")}


def test_the_names_in_the_report_and_of_the_layers() -> None:
    base = build("llama")
    names = _projections(base)
    checkpointed(base)
    with pk.patch_peft() as report:
        model = peft.get_peft_model(base, config("llama"))
    assert {layer.name for layer in report.layers} == names
    assert {name for name, _ in layers_of(model)} == names
    assert not set(lora_layers(model)) & names
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\.self_attn\.q_proj'"):
        pk.save_pissa(model, "nowhere")


def test_an_adapter_is_loaded_into_a_wrapped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = made(checkpointed)
    train(model)
    model.save_pretrained(tmp_path)
    no_svd(monkeypatch)
    checkpointed(base)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert moved(output(model), output(loaded)) == 0.0


def test_a_conversion_while_saving(tmp_path: Path) -> None:
    base, model = made(checkpointed)
    pk.save_pissa(model, tmp_path / "residual")
    train(model)
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "residual/pissa_init")
    assert model.peft_config.keys() == {"default"}
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert moved(output(model), output(loaded)) <= allowed(torch.float32)


def test_wrappers_in_wrappers_are_put_back_after_an_error() -> None:
    inner = nn.Linear(3, 3)
    model = nn.Sequential(checkpoint_wrapper(torch.compile(checkpoint_wrapper(inner))))
    outer = model[0]
    names = [name for name, _ in model.named_modules()]
    assert innermost(outer) is inner
    assert all_names(model) == {"", "0", "0.weight", "0.bias"}

    def fail() -> None:
        with unwrapped(model):
            assert model[0] is inner
            assert [name for name, _ in model.named_modules()] == ["", "0"]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert model[0] is outer
    assert [name for name, _ in model.named_modules()] == names


# Refusals


@pytest.mark.parametrize("defect", ["empty", "without a layer", "a piece"])
def test_an_incomplete_state_is_refused_before_anything_is_written(defect: str, tmp_path: Path) -> None:
    _, model = made(checkpointed)
    state = model.state_dict()
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    if defect == "empty":
        state = {}
    elif defect == "without a layer":
        del state[key]
    else:
        state[key] = state[key].flatten()[:100]
    words = r"a piece \(100,\) instead of \(4, 96\) of" if defect == "a piece" else "no"
    with pytest.raises(ValueError, match=rf"\Alayer 'model\.layers\.\S+': the state to save has {words} 'base_model"):
        model.save_pretrained(tmp_path / "out", state_dict=state)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", state_dict=state, is_main_process=False)
    assert not list((tmp_path / "out").iterdir())


class Other(nn.Module):
    """A model with none of the names of the others, and a layer of the same target."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(96, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)  # type: ignore[no-any-return]


def test_initial_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    _, model = made(checkpointed)
    model.save_pretrained(tmp_path)
    other = Other()
    before = copy.deepcopy(other.state_dict())
    words = r"the initial factors of 14 layers, such as 'model\.layers\.0\.self_attn\.q_proj', .*\(Other\) has none"
    with pk.patch_peft(), pytest.raises(ValueError, match=words):
        peft.PeftModel.from_pretrained(other, tmp_path)
    assert other.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pk.patch_peft():
        adapted = peft.get_peft_model(other, config("llama", target_modules=["q_proj"]))
        for name in ("default", "second"):  # values for an adapter that exists, and another one
            with pytest.raises(ValueError, match=words):
                adapted.load_adapter(tmp_path, name)
    assert "second" not in adapted.base_model.model.q_proj.lora_A
