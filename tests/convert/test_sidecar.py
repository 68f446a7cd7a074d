"""Every kind of layer from the hook's own file of initial factors to a plain LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.convert.convert import convert_adapter

from .kinds import EXPERTS, Kinds, layers_of, output, train

MODULES = ["embed", "attn", "conv1", "conv2", "conv3", "grouped", "proj"]
EXPERT_NAMES = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def trained_by_hook(base: Any, folder: Path, **settings: Any) -> Any:
    config = peft.LoraConfig(**({"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"} | settings))
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
        assert off(output(model), output(base)) <= 1e-5
        train(model)
        model.save_pretrained(folder / "trained")
    return model


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_all_kinds(transposed: bool, rank: int | None, tmp_path: Path) -> None:
    torch.manual_seed(5)
    base = Kinds(transposed=transposed)
    model = trained_by_hook(
        base,
        tmp_path,
        target_modules=MODULES,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"attn": 4},
        alpha_pattern={"down_proj": 5},
    )
    done = convert_adapter(tmp_path / "trained", tmp_path / "trained", tmp_path / "lora", rank=rank)
    names = {layer.name: layer for layer in done.layers}
    assert names.keys() == {*MODULES, "attn.base_layer.out_proj", *EXPERT_NAMES}
    assert {names[name].parts for name in EXPERT_NAMES} == {EXPERTS}
    assert names["grouped"].parts == 2
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    ranks = {layer.r["default"] for _, layer in layers_of(plain)}
    if rank is None:
        assert ranks == {4, 8}
        assert off(output(plain), output(model)) <= 1e-6
        assert off(output(base), output(model)) > 1e-2
    else:
        assert ranks == {2}
        assert 0.01 < done.loss < 0.9
        assert off(output(plain), output(model)) < off(output(base), output(model))


@pytest.mark.parametrize("names", [("w3", "w1"), ("w1", "w3")])
def test_parameters_of_one_shape(names: tuple[str, str], tmp_path: Path) -> None:
    """PEFT's file does not tell them apart; the order in the file of initial factors does."""
    torch.manual_seed(5)
    base = Kinds(names)
    settings = {"target_parameters": [f"experts.{name}" for name in names], "alpha_pattern": {"w3": 7}}
    model = trained_by_hook(base, tmp_path, **settings)
    done = convert_adapter(tmp_path / "trained", tmp_path / "trained", tmp_path / "lora")
    assert {layer.name for layer in done.layers} == {f"mlp.experts.{name}" for name in names}
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    assert off(output(plain), output(model)) <= 1e-6
    assert off(output(base), output(model)) > 1e-2
