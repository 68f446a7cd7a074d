"""Adapters of fused experts and other parameters: the original model with the plain LoRA is the trained model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from pissa_kernels.convert.convert import convert_adapter

from .adapters import Weights, retensor, rewrite
from .kinds import EXPERTS, HIDDEN, INNER, Kinds, adapted, factors, layers_of, output, products, save

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ORDERS = {
    "one": ["gate_up_proj"],
    "two": ["gate_up_proj", "down_proj"],
    "two, the other way": ["down_proj", "gate_up_proj"],
    "three": ["gate_up_proj", "gate_up_bias", "down_proj"],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranks": {"rank_pattern": {"gate_up_proj": 3}},
    "ranks and alphas": {"rank_pattern": {DOWN: 1}, "alpha_pattern": {"experts.gate_up_proj": 9}, "use_rslora": True},
}


def make(folder: Path, order: str = "two", *, transposed: bool = False, **settings: Any) -> tuple[Any, Any]:
    """The original and the trained model, saved in ``folder``."""
    torch.manual_seed(1)
    targets = ORDERS[order]
    base = Kinds([*targets, *(["down_proj"] if order == "one" else [])], transposed=transposed)
    model = adapted(base, target_parameters=[f"mlp.experts.{name}" for name in targets], **settings)
    assert off(output(base), output(model)) <= 1e-6
    save(folder, base, model)
    return base, model


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def loaded(base: Any, folder: Path) -> Any:
    """The original model with the converted adapter, loaded by PEFT alone."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_original_model_with_the_lora_is_the_trained_model(
    order: str, setting: str, transposed: bool, tmp_path: Path
) -> None:
    base, model = make(tmp_path, order, transposed=transposed, target_modules=["proj"], **SETTINGS[setting])
    ranks = {layer.parameter_name: layer.r["default"] for _, layer in layers_of(model)[:-1]}
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")
    plain = loaded(base, tmp_path / "lora")
    assert off(output(base), output(model)) > 1e-2
    assert off(output(plain), output(model)) <= 1e-6
    assert done.loss == 0
    assert done.checked is not None
    assert 0 < done.checked <= 1
    assert not done.notes
    before, after = layers_of(model), layers_of(plain)
    for (name, layer), (same, lora) in zip(before, after, strict=True):
        assert (name, 2 * layer.r["default"]) == (same, lora.r["default"])
        assert math.isclose(layer.scaling["default"], lora.scaling["default"], rel_tol=1e-15)
    assert set(ranks) == set(ORDERS[order])


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_expert_gets_the_nearest_product_of_its_rank(setting: str, rank: int, tmp_path: Path) -> None:
    base, model = make(tmp_path, **SETTINGS[setting])
    initial = load_file(tmp_path / "residual/pissa_init/adapter_model.safetensors")
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual/pissa_init", tmp_path / "lora", rank=rank)
    plain = dict(layers_of(loaded(base, tmp_path / "lora")))
    losses = []
    for path, layer in layers_of(model):
        before = [initial[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB"]
        change = [
            new - old for new, old in zip(products(layer, *factors(layer)), products(layer, *before), strict=True)
        ]
        kept = min(rank, 2 * layer.r["default"])
        assert plain[path].r["default"] == kept
        left = 0.0
        for wanted, found in zip(change, products(plain[path], *factors(plain[path])), strict=True):
            tail = torch.linalg.svdvals(wanted)[kept:].square().sum()
            assert torch.linalg.matrix_rank(found, rtol=1e-5) <= kept
            assert float((wanted - found).norm()) <= float(tail.sqrt()) + 1e-6 * float(wanted.norm())
            left += float(tail)
        losses.append((left, sum(float(part.square().sum()) for part in change)))
    share = sum(left for left, _ in losses) / sum(whole for _, whole in losses)
    assert done.loss == pytest.approx(share**0.5, rel=1e-5, abs=1e-7)
    assert sorted(layer.loss for layer in done.layers) == pytest.approx(
        sorted((left / whole) ** 0.5 for left, whole in losses), rel=1e-5, abs=1e-7
    )


def test_the_report_names_parameters_that_are_known(tmp_path: Path) -> None:
    make(tmp_path, rank_pattern={"gate_up_proj": 3})
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", rank=3)
    assert {layer.name: (layer.shape, layer.rank, layer.parts) for layer in done.layers} == {
        GATE_UP: ((2 * INNER, HIDDEN), 3, EXPERTS),
        DOWN: ((HIDDEN, INNER), 3, EXPERTS),
    }
    assert [layer.to_dict()["parts"] for layer in done.layers] == [EXPERTS, EXPERTS]
    assert "gate_up_proj" in done.table()


def alone(folder: Path) -> None:
    """Move the initial adapter away from the residual checkpoint, whose tensors have the parameters' names."""
    (folder / "residual" / "pissa_init").rename(folder / "pissa_init")


def test_without_names_layers_have_their_paths_in_peft(tmp_path: Path) -> None:
    base, model = make(tmp_path)
    alone(tmp_path)
    done = convert_adapter(tmp_path / "trained", tmp_path / "pissa_init", tmp_path / "lora")
    assert {layer.name for layer in done.layers} == {"mlp.experts", "mlp.experts.base_layer"}
    assert off(output(loaded(base, tmp_path / "lora")), output(model)) <= 1e-6


def test_alphas_that_may_belong_to_either_parameter_are_refused(tmp_path: Path) -> None:
    make(tmp_path, alpha_pattern={"down_proj": 9})
    alone(tmp_path)
    with pytest.raises(ValueError, match=r"layer 'mlp\.experts': .* which of mlp\S+gate_up_proj, mlp\S+down_proj its"):
        convert_adapter(tmp_path / "trained", tmp_path / "pissa_init", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# The base model


def test_another_base_is_refused_with_the_layer(tmp_path: Path) -> None:
    make(tmp_path, rank_pattern={"gate_up_proj": 3})

    def nudge(tensors: Weights) -> None:
        tensors[DOWN][EXPERTS - 1, 3, 2] += 1e-4

    retensor(tmp_path / "base/model.safetensors", nudge)
    words = r"layer 'mlp\.experts\.down_proj': .* times the rounding bound"
    with pytest.raises(ValueError, match=words):
        convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")


def one_by_one(tensors: Weights) -> None:
    """Experts as checkpoints of Mixtral and Qwen have them: gate, up and down of each."""
    gate_up, down = tensors.pop(GATE_UP), tensors.pop(DOWN)
    for expert in range(EXPERTS):
        place = f"mlp.experts.{expert}"
        gate, up = gate_up[expert].chunk(2)
        tensors |= {f"{place}.gate_proj.weight": gate.contiguous(), f"{place}.up_proj.weight": up.contiguous()}
        tensors[f"{place}.down_proj.weight"] = down[expert].contiguous()


def targets(*, apart: bool, transposed: bool = False) -> dict[str, dict[str, Any]]:
    """The targets of a manifest."""
    layers = {GATE_UP: "mlp.experts.base_layer", DOWN: "mlp.experts"}
    if not apart:
        return {
            name: {"layer": name, "transposed": transposed, "experts": EXPERTS, "key": key}
            for name, key in layers.items()
        }
    found: dict[str, dict[str, Any]] = {}
    for expert in range(EXPERTS):
        rows = {"gate_proj": (0, INNER), "up_proj": (INNER, 2 * INNER), "down_proj": (0, HIDDEN)}
        for name, held in rows.items():
            layer = DOWN if name == "down_proj" else GATE_UP
            found[f"mlp.experts.{expert}.{name}.weight"] = {
                "layer": layer, "transposed": False, "expert": expert, "rows": list(held), "key": layers[layer],
            }  # fmt: skip
    return found


def write_manifest(folder: Path, found: dict[str, dict[str, Any]], source: str = "base") -> None:
    from pissa_kernels.checkpoint.manifest import Manifest

    Manifest({"source": str(folder.parent / source)}, {}, found).write(folder)


@pytest.mark.parametrize("apart", [False, True])
def test_the_manifest_says_where_the_experts_are(apart: bool, tmp_path: Path) -> None:
    base, model = make(tmp_path, alpha_pattern={"down_proj": 9})
    for name in ("base", "residual"):
        retensor(tmp_path / name / "model.safetensors", one_by_one if apart else lambda tensors: None)
    write_manifest(tmp_path / "residual", targets(apart=apart))
    for initial in ("residual", "residual/pissa_init"):
        lora = tmp_path / f"lora {initial.replace('/', ' ')}"
        done = convert_adapter(tmp_path / "trained", tmp_path / initial, lora, base=tmp_path / "base")
        assert {layer.name: layer.rank for layer in done.layers} == {GATE_UP: 4, DOWN: 4}
        assert done.checked is not None
        assert 0 < done.checked <= 1
        assert not done.notes
        assert off(output(loaded(base, lora)), output(model)) <= 1e-6
    key = f"mlp.experts.{EXPERTS - 1}.up_proj.weight" if apart else GATE_UP

    def nudge(tensors: Weights) -> None:
        tensors[key][-1, -1] += 1e-4

    retensor(tmp_path / "base/model.safetensors", nudge)
    with pytest.raises(ValueError, match=r"layer 'mlp\.experts\.gate_up_proj': .* times the rounding bound"):
        convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "no", base=tmp_path / "base")


def test_experts_that_no_manifest_names_are_not_compared_and_a_note_says_so(tmp_path: Path) -> None:
    make(tmp_path, rank_pattern={"gate_up_proj": 3}, target_modules=["proj"])
    for name in ("base", "residual"):
        retensor(tmp_path / name / "model.safetensors", one_by_one)
    done = convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")
    assert done.checked is not None  # of the other layer
    assert len(done.notes) == 1
    assert done.notes[0].endswith(
        "(2 such) is not compared with the base model, because its experts are in tensors that no manifest names"
    )


def test_a_manifest_that_lacks_rows_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    for name in ("base", "residual"):
        retensor(tmp_path / name / "model.safetensors", one_by_one)
    found = targets(apart=True)
    del found["mlp.experts.3.up_proj.weight"]
    write_manifest(tmp_path / "residual", found)
    with pytest.raises(ValueError, match=r"layer '\S+gate_up_proj': of expert 3, .* rows 0 to 7; accepted .* 0 to 14"):
        convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora", base=tmp_path / "base")


# Pairs that do not belong together

A, B = (f"base_model.model.mlp.experts.lora_{factor}.weight" for factor in "AB")


def less_experts(tensors: Weights) -> None:
    tensors[A] = tensors[A][:-2].contiguous()
    tensors[B] = tensors[B][:, :-2].contiguous()


REFUSALS: dict[str, tuple[Any, str]] = {
    "rows": (
        lambda tensors: tensors.update({A: tensors[A][:-1].contiguous()}),
        r"layer 'mlp\.experts': lora_A has 9 rows.*accepted are factors of",
    ),
    "columns": (
        lambda tensors: tensors.update({B: tensors[B][:, :-1].contiguous()}),
        r"layer 'mlp\.experts' in \S+: lora_B has shape \(12, 9\); accepted is \(out, 10\)",
    ),
    "experts": (less_experts, r"layer 'mlp\.experts\S*': (number of matrices 4 in \S+, but 5|lora_A has 8 rows)"),
    "half": (lambda tensors: tensors.pop(A), r"layer 'mlp\.experts' in \S+: lora_A is missing"),
    "wrapper": (
        lambda tensors: [tensors.pop(key) for key in (A, B)],
        r"layer 'mlp\.experts': its wrappers mlp\.experts\.base_layer are not nested",
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


def test_a_parameter_that_the_config_does_not_name(tmp_path: Path) -> None:
    make(tmp_path)
    rewrite(tmp_path / "trained", target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"layer 'mlp\.experts\.base_layer': .* factors of mlp\.experts\.down_proj, "):
        convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora")


def test_swapped_adapters(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match="swapped"):
        convert_adapter(tmp_path / "residual/pissa_init", tmp_path / "trained", tmp_path / "lora")


def test_the_config_keeps_its_parameters(tmp_path: Path) -> None:
    make(tmp_path, "three")
    convert_adapter(tmp_path / "trained", tmp_path / "residual", tmp_path / "lora")
    written = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert written["target_parameters"] == sorted(f"mlp.experts.{name}" for name in ORDERS["three"])
    assert written["init_lora_weights"] is True
