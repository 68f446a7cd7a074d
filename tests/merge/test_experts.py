"""Merged experts: every matrix is W + s·B·A to one rounding, whether a file has them in one tensor or one by one."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import pissa_kernels as pk

from ..convert.adapters import retensor, rewrite
from ..support.adapted import allowed, moved
from ..support.checkpoints import tensors
from ..support.experts import BOTH, EXPERTS, moe, saved
from ..support.merging import adapt as adapt_quantized
from ..support.merging import load, train
from ..support.models import output
from ..support.reference import ROUNDOFF

CASES = [
    ("mixtral", torch.bfloat16, False),
    ("qwen3_moe", torch.float32, False),
    ("qwen3_moe", torch.bfloat16, True),
    ("deepseek_v3", torch.float32, False),
    ("gpt_oss", torch.bfloat16, True),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small take longer on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapt(out: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(load(out), adapter, is_trainable=True).train()


def residual(folder: Path, name: str, dtype: torch.dtype, fused: bool, **options: Any) -> Path:
    """Save a model as ``base`` and what init makes of it, linear layers too, as ``out``."""
    saved(moe(name, dtype, layers=2), folder / "base", fused=fused)
    settings = {"rank": 3, "target_parameters": BOTH, "target_modules": ["q_proj", "o_proj"], "progress": False}
    if name == "deepseek_v3":
        settings["target_modules"] = ["o_proj"]
    pk.init_checkpoint(folder / "base", folder / "out", **(settings | options))
    return folder / "out"


def expected(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """W_res + s·B·A of every stack of a PEFT model in float64, as the model has it, and a bound on float32's round-off.

    By PEFT's own ``get_delta_weight`` in float64.
    """
    wide, sizes = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    found = {}
    for (name, layer), absolute in zip(
        [(name, module) for name, module in wide.named_modules() if type(module).__name__ == "ParamWrapper"],
        [module for module in sizes.modules() if type(module).__name__ == "ParamWrapper"],
        strict=True,
    ):
        for factor in (absolute.lora_A, absolute.lora_B):
            factor["default"].weight.data.abs_()
        W = layer.get_param().detach()
        rank = layer.r["default"]
        slack = (rank + 2) * 2.0**-24 * (W.abs() + absolute.get_delta_weight("default").detach())
        owner = name.removeprefix("base_model.model.").replace(".base_layer", "")
        found[f"{owner}.{layer.parameter_name}"] = (W + layer.get_delta_weight("default").detach(), slack)
    return found


def worst(out: Path, trained: Path, merged: Path, dtype: torch.dtype) -> float:
    """Largest error of a merged expert relative to one rounding to its dtype, as transformers loads both models."""
    values = dict(load(merged, dtype).named_parameters())
    errors = []
    for name, (wanted, slack) in expected(adapt(out, trained)).items():
        assert values[name].dtype == dtype
        bound = ROUNDOFF[dtype] * (wanted.abs() + slack) + slack + 1e-40
        errors.append(float(((values[name].double() - wanted).abs() / bound).max()))
    assert errors
    return max(errors)


@pytest.mark.parametrize(("name", "dtype", "fused"), CASES)
def test_a_residual_of_init(name: str, dtype: torch.dtype, fused: bool, tmp_path: Path) -> None:
    out = residual(tmp_path, name, dtype, fused)
    model = adapt(out, out / "pissa_init")
    before = output(model.eval())
    trained = train(model.train(), tmp_path / "trained", 3.0)
    report = pk.merge_checkpoint(out, trained, tmp_path / "merged", progress=False, workers=2)
    base, found = tensors(tmp_path / "base"), tensors(tmp_path / "merged")
    assert {key: (value.dtype, value.shape) for key, value in found.items()} == {
        key: (value.dtype, value.shape) for key, value in base.items()
    }
    assert worst(out, trained, tmp_path / "merged", dtype) <= 1
    # without rounding, as a router may choose another expert for weights that are rounded
    after = output(adapt(out, trained).eval())
    pk.merge_checkpoint(out, trained, tmp_path / "exact", dtype="float32", progress=False)
    assert moved(after, output(load(tmp_path / "exact"))) <= allowed(torch.float32)
    assert moved(before, after) > 100 * allowed(torch.float32)
    manifest = json.loads((out / "pissa_manifest.json").read_text())["targets"]
    assert {key for key in base if not torch.equal(found[key], base[key])} <= manifest.keys()
    assert sum(layer.tensors for layer in report.layers) == len(manifest)
    assert {layer.get("tensors", 1) for layer in report.to_dict()["layers"]} == {
        layer.tensors for layer in report.layers
    }
    assert {layer.name for layer in report.layers} == {about["layer"] for about in manifest.values()}
    assert report.copied == len(base) - len(manifest)


@pytest.mark.parametrize(("name", "fused"), [("mixtral", False), ("gpt_oss", True)])
def test_the_untrained_adapter_gives_the_original_back(name: str, fused: bool, tmp_path: Path) -> None:
    out = residual(tmp_path, name, torch.bfloat16, fused)
    pk.merge_checkpoint(out, out / "pissa_init", tmp_path / "merged", progress=False)
    found = tensors(tmp_path / "merged")
    for key, weight in tensors(tmp_path / "base").items():
        off = (found[key].double() - weight.double()).abs()
        assert bool((off <= 2.0**-7 * weight.double().abs() + 1e-3).all()), key


def test_another_dtype(tmp_path: Path) -> None:
    out = residual(tmp_path, "qwen3_moe", torch.bfloat16, True)
    trained = train(adapt(out, out / "pissa_init"), tmp_path / "trained", 3.0)
    pk.merge_checkpoint(out, trained, tmp_path / "merged", dtype="float32", progress=False)
    assert {value.dtype for value in tensors(tmp_path / "merged").values()} == {torch.float32}
    assert worst(out, trained, tmp_path / "merged", torch.float32) <= 1


@pytest.mark.parametrize(("name", "fused"), [("mixtral", False), ("qwen3_moe", True), ("gpt_oss", True)])
def test_both_ways_to_the_trained_model_agree(name: str, fused: bool, tmp_path: Path) -> None:
    """The residual with the adapter, and the original with the converted adapter, which no manifest describes."""
    out = residual(tmp_path, name, torch.float32, fused)
    trained = train(adapt(out, out / "pissa_init"), tmp_path / "trained", 3.0)
    converted = pk.convert_adapter(trained, out, tmp_path / "lora", base=tmp_path / "base")
    assert converted.checked is not None
    assert converted.checked <= 1
    assert not converted.notes
    assert {layer.parts for layer in converted.layers} == {1, EXPERTS}
    for first, second, result in ((out, trained, "one"), (tmp_path / "base", tmp_path / "lora", "other")):
        pk.merge_checkpoint(first, second, tmp_path / result, progress=False)
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.allclose(value, other[key], rtol=1e-5, atol=1e-5), key
    assert moved(output(load(tmp_path / "one")), output(load(tmp_path / "base"))) > 1e-3


@pytest.mark.parametrize(("name", "fused"), [("mixtral", False), ("deepseek_v3", True), ("gpt_oss", True)])
def test_a_plain_lora_as_peft_merges_it(name: str, fused: bool, tmp_path: Path) -> None:
    """Ranks and alphas by the parameters' names, which the model tells apart."""
    model = moe(name, torch.float32, layers=2)
    saved(model, tmp_path / "base", fused=fused)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["o_proj"], target_parameters=BOTH, init_lora_weights=False,
        rank_pattern={"gate_up_proj": 2}, alpha_pattern={"down_proj": 7}, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.save_pretrained(tmp_path / "trained")
    report = pk.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "merged", progress=False)
    found = dict(load(tmp_path / "merged").named_parameters())
    before = dict(model.named_parameters())
    for key, value in adapted.merge_and_unload().named_parameters():
        assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-6), key
        assert key.endswith(("gate_up_proj", "down_proj", "o_proj.weight")) <= (not torch.equal(value, before[key]))
    ranks = {layer.name.rpartition(".")[2]: (layer.rank, layer.scaling) for layer in report.layers}
    assert ranks == {"o_proj": (3, 5 / 3), "gate_up_proj": (2, 2.5), "down_proj": (3, 7 / 3)}


def test_an_adapter_of_the_model_without_its_head(tmp_path: Path) -> None:
    model = moe("qwen3_moe", torch.float32, layers=1)
    saved(model, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=BOTH, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model.model), config)
    adapted.save_pretrained(tmp_path / "trained")
    pk.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "merged", progress=False)
    found = dict(load(tmp_path / "merged").model.named_parameters())
    for key, value in adapted.merge_and_unload().named_parameters():
        assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-6), key


# Refusals


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    residual(folder, "mixtral", torch.float32, False)
    return folder


@pytest.fixture
def copied(mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtral, tmp_path / "copied"))


def refused(folder: Path, words: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        pk.merge_checkpoint(folder / "out", folder / "trained", folder / "merged", progress=False)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def wrapper(folder: Path, parameter: str) -> str:
    """Key of a stack's factors in the adapter's file, without the factor."""
    targets = json.loads((folder / "out/pissa_manifest.json").read_text())["targets"].values()
    return next("base_model.model." + about["key"] for about in targets if about["layer"].endswith(parameter))


def test_factors_of_another_shape(copied: Path) -> None:
    shutil.copytree(copied / "out/pissa_init", copied / "trained")
    key = wrapper(copied, "down_proj") + ".lora_B.weight"
    path = copied / "trained/adapter_model.safetensors"
    width = load_file(path)[key].shape[1]
    retensor(path, lambda found: found.update({key: torch.ones(41, width)}))
    refused(copied, r"layer 'model\.layers\.0\.mlp\.experts\.down_proj'.* rows 0 to 40; accepted .* 0 to 41 once")


def test_another_number_of_experts(copied: Path) -> None:
    shutil.copytree(copied / "out/pissa_init", copied / "trained")
    key = wrapper(copied, "down_proj")
    path = copied / "trained/adapter_model.safetensors"
    A, B = (load_file(path)[f"{key}.lora_{factor}.weight"] for factor in "AB")

    def less(found: dict[str, torch.Tensor]) -> None:
        found[f"{key}.lora_A.weight"] = A[: -len(A) // EXPERTS].contiguous()
        found[f"{key}.lora_B.weight"] = B[:, : -len(A) // EXPERTS].contiguous()

    retensor(path, less)
    refused(copied, r"layer 'model\.layers\.0\.mlp\.experts\.down_proj'.* has expert 10, and the adapter has 10")


def test_factors_that_are_not_finite(copied: Path) -> None:
    shutil.copytree(copied / "out/pissa_init", copied / "trained")
    key = wrapper(copied, "gate_up_proj") + ".lora_A.weight"
    retensor(copied / "trained/adapter_model.safetensors", lambda found: found[key][3, 2].fill_(torch.nan))
    refused(copied, r"layer 'model\.layers\.0\.mlp\.experts\.gate_up_proj': .* has NaN or Inf")


def test_a_lora_of_the_original_is_refused_on_the_residual(copied: Path) -> None:
    initial = copied / "out/pissa_init"
    shutil.copytree(initial, copied / "changed")
    retensor(copied / "changed/adapter_model.safetensors", lambda found: [value.mul_(1.5) for value in found.values()])
    pk.convert_adapter(copied / "changed", initial, copied / "trained")
    refused(copied, "is a plain LoRA of the original model")


def test_a_parameter_that_the_checkpoint_does_not_have(copied: Path) -> None:
    shutil.copytree(copied / "out/pissa_init", copied / "trained")
    rewrite(copied / "trained", target_parameters=["experts.gate_up_proj", "experts.other"])
    refused(copied, r"model\.layers\.\d\.mlp\.experts\S*'?: .*")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_residual_of_the_hook(name: str, tmp_path: Path) -> None:
    """No manifest tells where its experts are: the model does."""
    model = moe(name, torch.float32, layers=2)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["o_proj"], target_parameters=BOTH, init_lora_weights="pissa"
    )
    saved(model, tmp_path / "base")
    with pk.patch_peft():
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        pk.save_pissa(adapted, tmp_path / "out")
        trained = train(adapted.train(), tmp_path / "trained", 3.0)
        wanted = output(adapted.eval())
    pk.merge_checkpoint(tmp_path / "out", trained, tmp_path / "merged", progress=False)
    assert moved(wanted, output(load(tmp_path / "merged"))) <= allowed(torch.float32)
    assert moved(output(model), wanted) > 100 * allowed(torch.float32)
    for initial in ("out", "trained"):
        lora = tmp_path / f"lora from {initial}"
        done = pk.convert_adapter(trained, tmp_path / initial, lora, base=tmp_path / "base")
        # the file of Mixtral has experts one by one, whose names are those of no parameter
        assert len(done.notes) == (0 if (initial, name) == ("out", "gpt_oss") else 1)
        assert (done.checked is not None) == (initial == "out")
        assert {layer.parts for layer in done.layers} == {1, EXPERTS}
        plain = peft.PeftModel.from_pretrained(copy.deepcopy(model), lora).eval()
        assert moved(wanted, output(plain)) <= allowed(torch.float32)


@pytest.mark.parametrize(("name", "fused"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_quantized_layers_around_experts(name: str, fused: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    out = residual(tmp_path, name, torch.float32, fused, quantize="nf4")
    model = adapt_quantized(out, out / "pissa_init")
    trained = train(model, tmp_path / "trained", 3.0)
    report = pk.merge_checkpoint(out, trained, tmp_path / "merged", progress=False)
    assert {layer.quantized for layer in report.layers} == {None, "nf4"}
    base, found = tensors(tmp_path / "base"), tensors(tmp_path / "merged")
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in base.items()}
    assert moved(output(model.eval()), output(load(tmp_path / "merged"))) <= allowed(torch.float32)
    converted = pk.convert_adapter(trained, out, tmp_path / "lora", base=tmp_path / "base")
    assert converted.checked is not None
    assert converted.checked <= 1
    dropped = {layer.name for layer in converted.layers if layer.dropped is not None}
    assert dropped == {layer.name for layer in report.layers if layer.quantized}
