"""What an adapter holds besides the factors of PiSSA: carried to the plain LoRA, left out, or refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import pissa_kernels as pk
from pissa_kernels.cli import main as cli
from pissa_kernels.convert.convert import convert_adapter

from ..support.adapted import allowed, config, moved, train
from ..support.models import build, output
from ..support.trained import SETTINGS, VARIANTS, stored, trained
from .adapters import retensor

HEAD = "base_model.model.lm_head.base_layer.weight"


def make(setting: str, dtype: torch.dtype, folder: Path) -> tuple[Any, Any]:
    """Original and trained model, saved in ``folder`` as base, residual (with pissa_init) and trained."""
    name, changes = SETTINGS[setting]
    base = stored(build(name, dtype), folder / "base")
    with pk.patch_peft():
        model = trained(peft.get_peft_model(copy.deepcopy(base), config(name, **changes)).eval())
    pk.save_pissa(model, folder / "residual")
    model.save_pretrained(folder / "trained")
    return base, model


@pytest.mark.parametrize("initial", ["residual", pytest.param("trained", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "adapter_name"), VARIANTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_everything_trained_is_converted(
    setting: str, dtype: torch.dtype, adapter_name: str, initial: str, tmp_path: Path
) -> None:
    base, model = make(setting, dtype, tmp_path)
    done = convert_adapter(tmp_path / "trained", tmp_path / initial, tmp_path / "lora", base=tmp_path / "base")
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert moved(output(model), output(plain)) <= allowed(dtype)
    assert (done.checked is not None) == (initial == "residual")
    if SETTINGS[setting][1].get("bias", "none") == "none":
        with plain.disable_adapter():
            assert torch.equal(output(plain), output(base))


@pytest.mark.parametrize("rank", [None, 3])
def test_the_residual_of_a_head_is_left_out(rank: int | None, tmp_path: Path) -> None:
    """PEFT saves the base weight of an adapted head; earlier versions of this package left it there."""
    base, model = make("embedding and head", torch.float32, tmp_path)
    model.save_pretrained(tmp_path / "with_weight", save_embedding_layers=True)
    assert HEAD in load_file(tmp_path / "with_weight" / "adapter_model.safetensors")
    done = convert_adapter(tmp_path / "with_weight", tmp_path / "residual", tmp_path / "lora", rank=rank)
    assert not any("base_layer" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert not any("base_layer" in key for key in done.carried)
    assert any("base_layer.weight' (2 such) is not copied" in note for note in done.notes)
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    with plain.disable_adapter():
        assert torch.equal(output(plain), output(base))
    if rank is None:
        assert moved(output(model), output(plain)) <= allowed(torch.float32)


def test_another_layer_than_an_embedding_must_be_in_the_sidecar(tmp_path: Path) -> None:
    make("embedding", torch.float32, tmp_path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    new = "base_model.model.model.layers.0.self_attn.new.lora_{}.weight"

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({new.format(factor): tensors[key.format(factor)].clone() for factor in "AB"})

    shutil.copytree(tmp_path / "trained", tmp_path / "more")
    retensor(tmp_path / "more" / "adapter_model.safetensors", rename)
    with pytest.raises(ValueError, match=r"layer '\S+new' is in \S+more\S+ but not in \S+pissa_initial\.safetensors"):
        convert_adapter(tmp_path / "more", tmp_path / "trained", tmp_path / "lora")


# The two inputs swapped


def small_steps(name: str, folder: Path, dtype: torch.dtype, size: float) -> None:
    """An adapter whose factors have moved by ``size`` of their own size."""
    with pk.patch_peft():
        model = peft.get_peft_model(build(name, dtype), config(name))
    pk.save_pissa(model, folder / "residual")
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.data += size * parameter.detach().std() * noise
    model.save_pretrained(folder / "trained")


@pytest.mark.parametrize("sidecar", [True, False])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-3), (torch.float32, 0.5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_swapped_inputs_are_refused(name: str, dtype: torch.dtype, size: float, sidecar: bool, tmp_path: Path) -> None:
    small_steps(name, tmp_path, dtype, size)
    if not sidecar:
        (tmp_path / "trained" / "pissa_initial.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"the adapters are swapped: \S+pissa_init has the factors .*trained has") as e:
        convert_adapter(tmp_path / "residual" / "pissa_init", tmp_path / "trained", tmp_path / "lora")
    assert "\n" not in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before
    convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora")


def test_an_adapter_is_not_its_own_initial_one(tmp_path: Path) -> None:
    small_steps("llama", tmp_path, torch.float32, 1e-6)
    (tmp_path / "trained" / "pissa_initial.safetensors").unlink()
    with pytest.raises(ValueError, match=r"trained/\S+ is given as the trained and as the initial adapter; give the"):
        convert_adapter(tmp_path / "trained", tmp_path / "trained", tmp_path / "lora")


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 0.01), (torch.bfloat16, 0.2)])
def test_another_trained_adapter_is_not_the_initial_one(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    for name, moved_by in ("one", size), ("two", 3 * size):
        small_steps("llama", tmp_path / name, dtype, moved_by)
        (tmp_path / name / "trained" / "pissa_initial.safetensors").unlink()
    with pytest.raises(ValueError, match=r"two/trained/\S+ does not have the factors that PiSSA starts from, but"):
        convert_adapter(tmp_path / "one" / "trained", tmp_path / "two" / "trained", tmp_path / "lora")
    convert_adapter(tmp_path / "one" / "trained", tmp_path / "two" / "residual", tmp_path / "lora")


def test_the_initial_adapter_of_another_model(tmp_path: Path) -> None:
    small_steps("llama", tmp_path / "one", torch.float32, 0.1)
    torch.manual_seed(1)
    other = type(build("llama"))(build("llama").config)
    with pk.patch_peft():
        pk.save_pissa(peft.get_peft_model(other, config("llama")), tmp_path / "other")
    with pytest.raises(ValueError, match=r"one/trained/\S+ was not trained from \S+other/pissa_init/\S+: their prod"):
        convert_adapter(tmp_path / "one" / "trained", tmp_path / "other", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_trained_adapter_of_zeros_is_not_taken_for_swapped(tmp_path: Path) -> None:
    small_steps("llama", tmp_path, torch.float32, 0.1)
    path = tmp_path / "trained" / "adapter_model.safetensors"
    retensor(path, lambda tensors: tensors.update({key: torch.zeros_like(value) for key, value in tensors.items()}))
    convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora")


def test_swapped_inputs_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_steps("llama", tmp_path, torch.float32, 0.1)
    arguments = [str(tmp_path / "residual" / "pissa_init"), str(tmp_path / "trained"), str(tmp_path / "lora")]
    assert cli.main(["convert", *arguments]) == 1
    assert "the adapters are swapped" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-3])
def test_little_training_is_not_taken_for_swapped(size: float, dtype: torch.dtype, tmp_path: Path) -> None:
    small_steps("llama", tmp_path, dtype, size)
    for index, initial in enumerate(["residual", "trained"]):
        convert_adapter(tmp_path / "trained", tmp_path / initial, tmp_path / f"lora{index}")


def test_a_stock_adapter_is_not_taken_for_swapped(tmp_path: Path) -> None:
    model = peft.get_peft_model(build("llama"), config("llama"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    train(model)
    model.save_pretrained(tmp_path / "trained")
    convert_adapter(tmp_path / "trained", tmp_path / "initial", tmp_path / "lora")
    with pytest.raises(ValueError, match="the adapters are swapped"):
        convert_adapter(tmp_path / "initial", tmp_path / "trained", tmp_path / "other")
