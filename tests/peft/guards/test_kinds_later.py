"""Every kind of layer after the start: trained, saved, loaded, converted, merged, and beside other adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk

from ...support.kinds import KINDS, KindModel, build, lora_config
from ...support.kinds_operations import allowed, exact_output, off, output, patched, train

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.slow),
]
every_kind = pytest.mark.parametrize("name", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
MERGED = [name for name, kind in KINDS.items() if kind.merges]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_state(before: dict[str, torch.Tensor], model: Any) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [key for key in after if not torch.equal(after[key], before[key])] == []


@every_dtype
@every_kind
def test_a_trained_adapter_is_saved_and_loaded(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = build(name, dtype)
    model, _ = patched(name, base)
    expected = train(name, model)
    assert off(exact_output(name, base), expected) > 5 * allowed(name, base), "training has changed nothing"
    model.save_pretrained(tmp_path)
    with pk.patch_peft() as report:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert {layer.name for layer in report.layers} == KINDS[name].weights.keys()
    assert off(expected, output(name, loaded)) <= allowed(name, base)
    with pk.original_model(loaded):
        assert off(exact_output(name, base), output(name, loaded)) <= allowed(name, base)


@every_kind
def test_an_adapter_of_another_base_is_refused(name: str, tmp_path: Path) -> None:
    base = build(name)
    model, _ = patched(name, base)
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(base)
    for parameter in KINDS[name].weights.values():
        other.get_parameter(parameter).data *= 1.3
    before = state(other)
    with pytest.raises(ValueError, match=r"^layer 'layer.*the weight is not the one"), pk.patch_peft():
        peft.PeftModel.from_pretrained(other, tmp_path)
    after = {key.replace("base_layer.", ""): value for key, value in other.state_dict().items() if "lora_" not in key}
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@every_dtype
@every_kind
def test_the_residual_model_and_its_adapter_load_without_the_hook(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = build(name, dtype)
    model, _ = patched(name, base)
    train(name, model)
    before = state(model)
    pk.save_pissa(model, tmp_path / "out")
    assert_state(before, model)
    residual = KindModel.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert residual.state_dict().keys() == base.state_dict().keys()
    assert off(exact_output(name, base), output(name, residual)) > 5 * allowed(name, base)
    plain = peft.PeftModel.from_pretrained(residual, tmp_path / "out" / "pissa_init").eval()
    assert off(exact_output(name, base), output(name, plain)) <= allowed(name, base)
    report = pk.Report.read(tmp_path / "out" / "pissa_init" / "pissa_report.json")
    assert {layer.name for layer in report.layers} == KINDS[name].weights.keys()


@every_dtype
@every_kind
def test_the_base_model_after_training(name: str, dtype: torch.dtype) -> None:
    base = build(name, dtype)
    model, _ = patched(name, base)
    expected = train(name, model)
    before = state(model)
    with pk.original_model(model):
        assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
    with model.disable_adapter():
        assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
    assert off(expected, output(name, model)) <= allowed(name, base)
    assert before.keys() == state(model).keys()


@every_dtype
@every_kind
def test_a_second_adapter(name: str, dtype: torch.dtype) -> None:
    base = build(name, dtype)
    model, _ = patched(name, base)
    first = train(name, model)
    with pk.patch_peft() as report:
        model.add_adapter("second", lora_config(name, 2, lora_alpha=7))
    assert {layer.name for layer in report.layers} == KINDS[name].weights.keys()
    assert all(layer.rank == 2 for layer in report.layers)
    assert off(first, output(name, model)) <= allowed(name, base)
    model.set_adapter("second")
    assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
    second = train(name, model)
    assert off(exact_output(name, base), second) > 5 * allowed(name, base)
    model.set_adapter("default")
    assert off(first, output(name, model)) <= allowed(name, base)
    with model.disable_adapter():
        assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
    model.set_adapter("second")
    assert off(second, output(name, model)) <= allowed(name, base)
    model.delete_adapter("default")
    assert off(second, output(name, model)) <= allowed(name, base)


@every_kind
def test_a_second_adapter_is_saved_and_loaded_by_itself(name: str, tmp_path: Path) -> None:
    base = build(name)
    model, _ = patched(name, base)
    with pk.patch_peft():
        model.add_adapter("second", lora_config(name, 2))
    model.set_adapter("second")
    expected = train(name, model)
    model.save_pretrained(tmp_path)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "second").eval()
    assert off(expected, output(name, loaded)) <= allowed(name, base)


@every_kind
def test_an_adapter_of_the_same_settings_shares_the_factors(name: str) -> None:
    base = build(name)
    model, _ = patched(name, base)
    first = train(name, model)
    with pk.patch_peft():
        model.add_adapter("reference", lora_config(name))
    model.set_adapter("reference")
    assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
    model.set_adapter("default")
    assert off(first, output(name, model)) <= allowed(name, base)


@every_kind
def test_a_plain_adapter_beside_it(name: str) -> None:
    base = build(name)
    model, _ = patched(name, base)
    train(name, model)
    model.add_adapter("plain", lora_config(name, init_lora_weights=True))  # after the block
    model.set_adapter("plain")
    assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)


@pytest.mark.parametrize("rank", [4, 3])
@every_kind
def test_a_new_adapter_after_delete_adapter(name: str, rank: int) -> None:
    base = build(name)
    model, _ = patched(name, base)
    train(name, model)
    model.delete_adapter("default")
    assert off(exact_output(name, base), output(name, model.base_model)) <= allowed(name, base)
    with pk.patch_peft():
        model.add_adapter("new", lora_config(name, rank))
    model.set_adapter("new")
    assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
    expected = train(name, model)
    model.delete_adapter("new")
    assert off(expected, output(name, model.base_model)) > 5 * allowed(name, base)
    assert off(exact_output(name, base), output(name, model.base_model)) <= allowed(name, base)


@every_dtype
@pytest.mark.parametrize("name", MERGED)
def test_merging(name: str, dtype: torch.dtype) -> None:
    base = build(name, dtype)
    model, _ = patched(name, base)
    start = copy.deepcopy(model)
    expected = train(name, model)
    model.merge_adapter()
    assert off(expected, output(name, model)) <= 2 * allowed(name, base)
    model.unmerge_adapter()
    assert off(expected, output(name, model)) <= 2 * allowed(name, base)
    model.merge_adapter(safe_merge=True)
    assert off(expected, output(name, model)) <= 2 * allowed(name, base)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert off(exact_output(name, base), output(name, model)) <= 2 * allowed(name, base)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert off(expected, output(name, merged)) <= 2 * allowed(name, base)
    # untrained, it is the base again: two stored terms and the sum are rounded
    again = start.merge_and_unload()
    unit = 2 * torch.finfo(dtype).eps
    for parameter in KINDS[name].weights.values():
        W = base.get_parameter(parameter).detach().double()
        assert (again.get_parameter(parameter).detach().double() - W).norm() <= unit * W.norm()


@every_dtype
@pytest.mark.parametrize("name", MERGED)
def test_merging_a_second_adapter(name: str, dtype: torch.dtype) -> None:
    base = build(name, dtype)
    model, _ = patched(name, base)
    first = train(name, model)
    with pk.patch_peft():
        model.add_adapter("second", lora_config(name, 2))
    model.set_adapter("second")
    second = train(name, model)
    model.merge_adapter(["second"])
    assert off(second, output(name, model)) <= 2 * allowed(name, base)
    model.unmerge_adapter()
    assert off(second, output(name, model)) <= 2 * allowed(name, base)
    model.set_adapter("default")
    assert off(first, output(name, model)) <= 2 * allowed(name, base)
    assert off(second, output(name, model.merge_and_unload(adapter_names=["second"]))) <= 2 * allowed(name, base)


@every_dtype
@every_kind
def test_unload(name: str, dtype: torch.dtype) -> None:
    base = build(name, dtype)
    model, _ = patched(name, base)
    train(name, model)
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in base.modules()]
    assert off(exact_output(name, base), output(name, unloaded)) <= allowed(name, base)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in MERGED])
def test_a_merge_that_peft_refuses_changes_nothing(name: str) -> None:
    model, _ = patched(name, build(name))
    expected = train(name, model)
    before = state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="groups > 1"):
            merge()
        assert_state(before, model)
        assert torch.equal(expected, output(name, model))


@every_kind
def test_peft_converts_a_trained_adapter(name: str, tmp_path: Path) -> None:
    """The base with the plain LoRA is the trained model."""
    base = build(name)
    model, _ = patched(name, base)
    expected = train(name, model)
    before = state(model)
    pk.save_pissa(model, tmp_path / "out")
    arguments = {"path_initial_model_for_weight_conversion": str(tmp_path / "out" / "pissa_init")}
    model.save_pretrained(tmp_path / "plain", **arguments)
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain").eval()
    assert off(expected, output(name, plain)) <= 2 * allowed(name, base)
    assert_state(before, model)


@every_dtype
@every_kind
def test_convert_adapter(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = build(name, dtype)
    model, _ = patched(name, base)
    expected = train(name, model)
    model.save_pretrained(tmp_path / "trained")
    pk.convert_adapter(tmp_path / "trained", tmp_path / "trained", tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain").eval()
    assert off(expected, output(name, plain)) <= 2 * allowed(name, base)
    with plain.disable_adapter():  # PEFT's passes of an attention have rounded its weights by now
        exact = allowed(name, base) if name == "MultiheadAttention" else 0.0
        assert off(output(name, base), output(name, plain)) <= exact
