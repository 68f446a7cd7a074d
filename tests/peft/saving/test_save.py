"""Saving, loading, converting, merging, and the original model: each gives the function that it should."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import pissa_kernels as pk
from pissa_kernels.peft.saving import sidecar

from ...support.adapted import (
    DTYPES,
    NAMES,
    allowed,
    assert_same,
    config,
    lora_layers,
    make,
    moved,
    no_svd,
    residuals,
    state,
    train,
)
from ...support.models import build, output

# save_pissa


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_residual_model_loads_without_this_package(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapted = make(name, dtype)
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    pk.save_pissa(adapted, tmp_path / "out")
    assert before.keys() == adapted.state_dict().keys()
    assert all(torch.equal(value, adapted.state_dict()[key]) for key, value in before.items())
    assert adapted.peft_config["default"].init_lora_weights == "pissa"
    no_svd(monkeypatch)
    factory = type(base)
    loaded = factory.from_pretrained(tmp_path / "out", dtype=dtype)
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "out", subfolder="pissa_init", is_trainable=True).eval()
    assert loaded.peft_config["default"].init_lora_weights is True
    assert_same(state(loaded), state(adapted))
    assert moved(output(base), output(loaded)) <= allowed(dtype)
    report = pk.Report.read(tmp_path / "out" / "pissa_init" / "pissa_report.json")
    assert {layer.name for layer in report.layers} == set(lora_layers(adapted))


def test_a_trained_model_still_saves_its_initial_adapter(tmp_path: Path) -> None:
    base, adapted = make("llama", torch.float32)
    train(adapted)
    pk.save_pissa(adapted, tmp_path / "out")
    loaded = type(base).from_pretrained(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "out" / "pissa_init").eval()
    assert moved(output(base), output(loaded)) <= allowed(torch.float32)


def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    base = build("llama")
    with pk.patch_peft():
        adapted = peft.get_peft_model(copy.deepcopy(base), config("llama"), adapter_name="first")
    pk.save_pissa(adapted, tmp_path / "out", adapter_name="first")
    assert (tmp_path / "out" / "pissa_init" / "adapter_model.safetensors").is_file()
    loaded = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "out"), tmp_path / "out/pissa_init")
    assert moved(output(base), output(loaded.eval())) <= allowed(torch.float32)


def test_save_pissa_gives_no_warning(tmp_path: Path) -> None:
    _, adapted = make("llama", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.save_pissa(adapted, tmp_path / "out")


def test_refusals_of_save_pissa(tmp_path: Path) -> None:
    base, adapted = make("llama", torch.float32)
    with pytest.raises(ValueError, match=r"'other' was not initialized by pissa_kernels \(adapters: default\)"):
        pk.save_pissa(adapted, tmp_path / "out", adapter_name="other")
    with pytest.raises(ValueError, match="was not initialized"):
        pk.save_pissa(peft.get_peft_model(base, config("llama", init_lora_weights=True)), tmp_path / "out")
    with pytest.raises(ValueError, match=r"\(adapters: none\)"):
        pk.save_pissa(build("llama"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="full exists and is not an empty folder"):
        pk.save_pissa(adapted, tmp_path / "full")
    adapted.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the weight of layer 'model\.layers\.0.*unmerge it first"):
        pk.save_pissa(adapted, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_adapter_added_later_gets_a_sidecar(tmp_path: Path) -> None:
    model = peft.get_peft_model(build("llama"), config("llama", init_lora_weights=True), adapter_name="plain")
    with pk.patch_peft():
        model.add_adapter("second", config("llama"))
    model.save_pretrained(tmp_path)
    assert [path.parent.name for path in tmp_path.rglob(sidecar.INITIAL_NAME)] == ["second"]


def test_only_pissa_adapters_get_a_sidecar(tmp_path: Path) -> None:
    _, adapted = make("llama", torch.float32)
    adapted.add_adapter("plain", config("llama", init_lora_weights=True))
    adapted.save_pretrained(tmp_path)
    assert sorted(path.parent.name for path in tmp_path.rglob(sidecar.INITIAL_NAME)) == [tmp_path.name]
    adapted.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not list((tmp_path / "none").rglob("pissa_*"))


# Converted and merged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_trained_adapter_converts_to_a_lora_of_the_original_model(
    dtype: torch.dtype, rslora: bool, tmp_path: Path
) -> None:
    base, adapted = make("llama", dtype, use_rslora=rslora)
    pk.save_pissa(adapted, tmp_path / "residual")
    train(adapted)
    initial = str(tmp_path / "residual" / "pissa_init")
    adapted.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=initial)
    assert not (tmp_path / "lora" / sidecar.INITIAL_NAME).exists()
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert plain.peft_config["default"].r == 2 * adapted.peft_config["default"].r
    assert moved(output(adapted), output(plain)) <= allowed(dtype)


EXTRAS: list[dict[str, Any]] = [{"modules_to_save": ["lm_head"]}, {"use_dora": True}]


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("extra", EXTRAS, ids=["modules_to_save", "dora"])
def test_other_trained_weights_are_converted_too(extra: dict[str, Any], safe: bool, tmp_path: Path) -> None:
    """PEFT's own conversion writes A and B only: no head, and the initial magnitudes."""
    base, adapted = make("llama", torch.float32, **extra)
    before = output(adapted)
    pk.save_pissa(adapted, tmp_path / "residual")
    train(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.1
    trained = output(adapted)
    initial = str(tmp_path / "residual" / "pissa_init")
    adapted.save_pretrained(
        tmp_path / "lora", safe_serialization=safe, path_initial_model_for_weight_conversion=initial
    )
    assert torch.equal(trained, output(adapted))
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert moved(before, trained) > 3 * allowed(torch.float32)
    assert moved(trained, output(plain)) <= allowed(torch.float32)
    assert not list((tmp_path / "lora").glob(".*"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_gives_the_trained_model(dtype: torch.dtype) -> None:
    _, adapted = make("llama", dtype)
    train(adapted)
    expected = output(adapted)
    assert moved(expected, output(adapted.merge_and_unload())) <= allowed(dtype)


# Two adapters


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_adapter_of_the_same_settings_shares_the_residual(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL makes one for its reference. Stock PEFT would subtract the principal components of the residual."""
    base, adapted = make("llama", dtype)
    train(adapted)
    trained, before = output(adapted), residuals(adapted)
    with monkeypatch.context() as patch:
        no_svd(patch)
        with pk.patch_peft() as report:
            adapted.add_adapter("ref", config("llama"))
    assert len(report.layers) == len(before)
    assert all(torch.equal(residual, before[name]) for name, residual in residuals(adapted).items())
    assert torch.equal(trained, output(adapted))
    with pk.original_model(adapted):
        assert moved(output(base), output(adapted)) <= allowed(dtype)
    adapted.set_adapter("ref")
    assert moved(output(base), output(adapted)) <= allowed(dtype)
    # each of the two is loaded alone, and then both
    adapted.save_pretrained(tmp_path)
    with pk.patch_peft():
        alone = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ref").eval()
        both = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        both.load_adapter(tmp_path / "ref", "ref")
    assert torch.equal(output(alone), output(adapted))
    assert torch.equal(output(both), trained)
    both.set_adapter("ref")
    assert torch.equal(output(both), output(adapted))


def test_a_second_adapter_of_other_settings_has_its_own_factors() -> None:
    base, adapted = make("llama", torch.float32)
    train(adapted)
    trained, before = output(adapted), residuals(adapted)
    with pk.patch_peft():
        adapted.add_adapter("other", config("llama", r=2))
    # nothing more is subtracted: the first adapter needs its residual
    assert all(torch.equal(residual, before[name]) for name, residual in residuals(adapted).items())
    assert all(layer.lora_A["other"].weight.shape[0] == 2 for layer in lora_layers(adapted).values())
    assert torch.equal(trained, output(adapted))
    bases = dict(base.named_modules())
    for name, layer in lora_layers(adapted).items():
        A, B = layer.lora_A["other"].weight.double(), layer.lora_B["other"].weight.double()
        W = bases[name].weight.double()
        # the principal part of W to the energy deficit that the package promises, and not that of the residual
        best, left = torch.linalg.svdvals(W)[2:].norm(), (W - layer.scaling["other"] * B @ A).norm()
        assert left**2 <= best**2 + 2e-6 * W.norm() ** 2
    with pk.original_model(adapted):
        assert moved(output(base), output(adapted)) <= allowed(torch.float32)
    adapted.set_adapter("other")
    assert moved(output(base), output(adapted)) <= allowed(torch.float32)


def test_the_state_dict_has_no_further_keys() -> None:
    base, adapted = make("llama", torch.float32)
    stock = peft.get_peft_model(copy.deepcopy(base), config("llama", init_lora_weights=True))
    assert adapted.state_dict().keys() == stock.state_dict().keys()
    assert [name for name, _ in adapted.named_buffers()] == [name for name, _ in stock.named_buffers()]


def test_layers_injected_without_a_peft_model() -> None:
    """PEFT's low-level call, which transformers' own ``add_adapter`` makes."""
    base = build("llama")
    expected = output(base)
    with pk.patch_peft() as report:
        peft.inject_adapter_in_model(config("llama"), base)
    assert len(report.layers) == 14
    assert isinstance(base, transformers.LlamaForCausalLM)
    assert moved(expected, output(base)) <= allowed(torch.float32)
