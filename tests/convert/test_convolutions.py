"""Adapters of convolutions, embeddings and nn.MultiheadAttention: the base with the plain LoRA is the trained model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from pissa_kernels.convert.convert import convert_adapter

from .adapters import retensor, rewrite
from .kinds import Kinds, adapted, factors, layers_of, output, products, save

KINDS = {
    "embedding": ["embed"],
    "attention": ["attn"],
    "conv1d": ["conv1"],
    "conv2d": ["conv2"],
    "conv3d": ["conv3"],
    "groups": ["grouped"],
}
ALL = [name for names in KINDS.values() for name in names]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"attn": 4, "conv1": 3, "embed": 5}, "alpha_pattern": {"attn": 9, "grouped": 7}},
}


def make(folder: Path, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(2)
    base = Kinds()
    model = adapted(base, **({"target_modules": ALL} | settings))
    assert off(output(base), output(model)) <= 1e-6
    save(folder, base, model)
    return base, model


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def loaded(base: Any, folder: Path) -> Any:
    """The original model with the converted adapter, loaded by PEFT alone."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_original_model_with_the_lora_is_the_trained_model(kind: str, setting: str, tmp_path: Path) -> None:
    base, model = make(tmp_path, target_modules=KINDS[kind], **SETTINGS[setting])
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")
    plain = loaded(base, tmp_path / "lora")
    assert off(output(base), output(model)) > 1e-3
    assert off(output(plain), output(model)) <= 1e-6
    assert done.loss == 0
    assert done.checked is not None
    assert 0 < done.checked <= 1
    assert not done.notes
    before, after = layers_of(model), layers_of(plain)
    assert [(name, 2 * layer.r["default"]) for name, layer in before] == [
        (name, layer.r["default"]) for name, layer in after
    ]
    assert {layer.name for layer in done.layers} == {name for name, _ in before}


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("setting", ["plain", "patterns"])
def test_each_matrix_gets_the_nearest_product_of_its_rank(setting: str, rank: int, tmp_path: Path) -> None:
    """Of a convolution with g groups, PEFT's rank is that of all together."""
    base, model = make(tmp_path, **SETTINGS[setting])
    initial = load_file(tmp_path / "residual/pissa_init/adapter_model.safetensors")
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", rank=rank)
    plain = dict(layers_of(loaded(base, tmp_path / "lora")))
    reports = {layer.name: layer for layer in done.layers}
    for name, layer in layers_of(model):
        ending = "lora_embedding_{}" if name == "embed" else "lora_{}.weight"
        before = [initial[f"base_model.model.{name}.{ending.format(factor)}"] for factor in "AB"]
        change = [
            new - old for new, old in zip(products(layer, *factors(layer)), products(layer, *before), strict=True)
        ]
        kept = min(rank, 2 * layer.r["default"])
        assert plain[name].r["default"] == reports[name].rank == kept
        assert reports[name].parts == len(change)
        left = 0.0
        for wanted, found in zip(change, products(plain[name], *factors(plain[name])), strict=True):
            tail = float(torch.linalg.svdvals(wanted)[kept // len(change) :].norm())
            assert float((wanted - found).norm()) <= tail + 1e-6 * float(wanted.norm())
            left += tail**2
        whole = sum(float(part.square().sum()) for part in change)
        assert reports[name].loss == pytest.approx((left / whole) ** 0.5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_that_groups_do_not_divide(rank: int, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=rf"layer 'grouped' is a convolution with 2 groups, .* and not {rank}; give"):
        convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", rank=rank)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d", "conv3d"])
def test_dora_keeps_its_magnitudes(kind: str, tmp_path: Path) -> None:
    """Each takes its norms from the sum of the weight and the product, which is the same in both models."""
    torch.manual_seed(2)
    base = Kinds()
    model = adapted(base, target_modules=KINDS[kind], use_dora=True)
    assert off(output(base), output(model)) <= 1e-6
    save(tmp_path, base, model)
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")
    assert len(done.carried) == 1
    assert off(output(loaded(base, tmp_path / "lora")), output(model)) <= 1e-6


def test_dora_of_groups_is_refused(tmp_path: Path) -> None:
    """PEFT takes its norms from a product of A and B that no forward pass computes with."""
    torch.manual_seed(2)
    base = Kinds()
    save(tmp_path, base, adapted(base, target_modules=["grouped"], use_dora=True))
    with pytest.raises(ValueError, match=r"layer 'grouped' is a convolution with 2 groups under DoRA, .*; use it with"):
        convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("key", ["embed.weight", "attn.in_proj_weight", "attn.out_proj.weight", "conv2.weight"])
def test_another_base_is_refused_with_the_layer(key: str, tmp_path: Path) -> None:
    make(tmp_path)
    retensor(tmp_path / "base/model.safetensors", lambda tensors: tensors[key].view(-1)[-1:].add_(1e-4))
    names = {"attn.in_proj_weight": "attn", "attn.out_proj.weight": "attn.base_layer.out_proj"}
    name = names.get(key, key.removesuffix(".weight")).replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"layer '{name}': .* times the rounding bound"):
        convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")


@pytest.mark.parametrize(("key", "shape"), [("grouped.weight", (12, 12, 3)), ("conv2.weight", (4, 3, 2, 3))])
def test_a_base_with_other_shapes_is_refused(key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    make(tmp_path)
    retensor(tmp_path / "base/model.safetensors", lambda tensors: tensors.update({key: torch.zeros(shape)}))
    with pytest.raises(ValueError, match=rf"'{key}' has shape .*; accepted is \("):
        convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")


C = "base_model.model.conv2"
REFUSALS: dict[str, tuple[Any, str]] = {
    "rank": (
        lambda tensors: tensors.update({f"{C}.lora_A.weight": torch.ones(3, 3, 3, 2)}),
        r"layer 'conv2' in \S+: lora_A has shape \(3, 3, 3, 2\); accepted is \(2, in, \*kernel\)",
    ),
    "kernel of B": (
        lambda tensors: tensors.update({f"{C}.lora_B.weight": torch.ones(4, 2, 2, 1)}),
        r"layer 'conv2' in \S+: .* lora_B \(4, 2, 2, 1\); accepted are .* of a convolution",
    ),
    "groups": (
        lambda tensors: tensors.update({f"{C}.lora_B.weight": torch.ones(4, 1, 1, 1)}),
        r"layer 'conv2': number of matrices 2 in \S+trained\S+, but 1 in",
    ),
    "kernel": (
        lambda tensors: tensors.update({f"{C}.lora_A.weight": torch.ones(2, 3, 2, 3)}),
        r"layer 'conv2': kernel \(2, 3\) in \S+trained\S+, but \(3, 2\) in",
    ),
    "dimensions": (
        lambda tensors: tensors.update({f"{C}.lora_A.weight": torch.ones(2, 18)}),
        r"layer 'conv2' in \S+: lora_B has shape",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_names_the_layer_and_writes_nothing(refusal: str, tmp_path: Path) -> None:
    make(tmp_path)
    spoil, words = REFUSALS[refusal]
    retensor(tmp_path / "trained/adapter_model.safetensors", spoil)
    with pytest.raises(ValueError, match=words) as caught:
        convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "lora").exists()


def test_swapped_adapters(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match="swapped"):
        convert_adapter(tmp_path / "residual/pissa_init", tmp_path / "trained", tmp_path / "lora")


def test_patterns_name_an_attention_by_its_own_name(tmp_path: Path) -> None:
    base, model = make(tmp_path, target_modules=["attn", "proj"], rank_pattern={"attn": 3}, alpha_pattern={"attn": 5})
    convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora")
    written = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (written["r"], written["rank_pattern"]) == (4, {"attn": 6})
    assert off(output(loaded(base, tmp_path / "lora")), output(model)) <= 1e-6
    rewrite(tmp_path / "trained", rank_pattern={"attn": 3, "out_proj": 7})
    convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", force=True)
    assert off(output(loaded(base, tmp_path / "lora")), output(model)) <= 1e-6
