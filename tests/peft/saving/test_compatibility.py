"""Files that version 0.1.0 has written: a pickled model, an adapter with its sidecar, a residual checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import pissa_kernels as pk
from pissa_kernels.cli import main as cli
from pissa_kernels.peft.saving import sidecar
from pissa_kernels.peft.saving.save import SavePretrained
from pissa_kernels.peft.weights.record import InitRecord, of_adapter

from ...support.adapted import lora_layers, moved, no_svd, train
from ...support.models import output
from ...support.reference import ROUNDOFF

FILES = Path(__file__).parents[2] / "fixtures" / "0.1.0"
BASE, ADAPTER, RESIDUAL = FILES / "base", FILES / "adapter", FILES / "residual"
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
SCALING = 2.0  # lora_alpha 4, r 2
TOKENS = 8  # two rows of them are the vocabulary


def load_base() -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).eval()


def factors(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every layer in float64, from the file alone."""
    tensors = load_file(path)
    keys = {name: f"base_model.model.{name}.lora_" for name in LAYERS}
    return {
        name: (tensors[f"{key}A.weight"].double(), tensors[f"{key}B.weight"].double()) for name, key in keys.items()
    }


def trained_in_float64() -> Any:
    """The trained model without an adapter: weights W + s·(B·A − B₀·A₀), with neither this package nor PEFT."""
    model = load_base().double()
    initial, trained = factors(ADAPTER / sidecar.INITIAL_NAME), factors(ADAPTER / "adapter_model.safetensors")
    for name in LAYERS:
        (A0, B0), (A, B) = initial[name], trained[name]
        model.get_submodule(name).weight.data += SCALING * (B @ A - B0 @ A0)
    return model


def allowed(dtype: torch.dtype = torch.bfloat16) -> float:
    """Twice what this dtype's arithmetic does to the outputs of the base model."""
    return 2 * moved(output(load_base().double(), TOKENS), output(load_base().to(dtype), TOKENS))


def load_pickled() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model, an input, and its output before PiSSA."""
    content = torch.load(FILES / "model.pt", weights_only=False)
    return content["model"].eval(), content["x"], content["y"].double()


def outputs(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).double()  # type: ignore[no-any-return]


def test_a_pickled_model_computes_what_it_did() -> None:
    model, x, y = load_pickled()
    assert moved(y, outputs(model, x)) <= 8 * ROUNDOFF[torch.float32]
    train(model)
    assert moved(y, outputs(model, x)) > 1e-2
    with pk.original_model(model):
        assert moved(y, outputs(model, x)) <= 8 * ROUNDOFF[torch.float32]


def test_a_pickled_model_saves_its_sidecar(tmp_path: Path) -> None:
    model, _, _ = load_pickled()
    assert type(model.save_pretrained) is SavePretrained
    model.save_pretrained(tmp_path)
    saved = sidecar.read(tmp_path / sidecar.INITIAL_NAME, "default")
    assert saved.keys() == lora_layers(model).keys() == {"0", "2"}
    for name, layer in lora_layers(model).items():
        record = of_adapter(layer, "default")
        assert type(record) is InitRecord
        assert torch.equal(saved[name].lora_A, layer.lora_A["default"].weight)
        assert torch.equal(saved[name].lora_B, layer.lora_B["default"].weight)
        assert torch.equal(saved[name].after, record.after)
        assert (record.report.rank, record.report.init, record.report.scaling) == (2, "pissa", 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_trained_adapter_loads_without_an_svd(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    no_svd(monkeypatch)
    base, initial = load_base().to(dtype), factors(ADAPTER / sidecar.INITIAL_NAME)
    with pk.patch_peft() as report:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), ADAPTER).eval()
    assert {layer.name for layer in report.layers} == set(LAYERS)
    for name, layer in lora_layers(model).items():
        (A, B), W = initial[name], base.get_submodule(name).weight.double()
        residual = W - SCALING * B @ A
        # one rounding of the residual, and those of the float32 product
        bound = ROUNDOFF[dtype] * residual.abs() + 4 * 2**-24 * (W.abs() + SCALING * B.abs() @ A.abs())
        assert ((layer.get_base_layer().weight.double() - residual).abs() <= 1.01 * bound).all(), name
    expected, original = output(trained_in_float64(), TOKENS), output(load_base().double(), TOKENS)
    assert moved(original, expected) > 3 * allowed(dtype)
    assert moved(expected, output(model, TOKENS)) <= allowed(dtype)
    with pk.original_model(model):
        assert moved(original, output(model, TOKENS)) <= allowed(dtype)


@pytest.mark.parametrize("way", ["function", "command"])
def test_a_trained_adapter_converts_with_its_sidecar(way: str, tmp_path: Path) -> None:
    if way == "function":
        pk.convert_adapter(ADAPTER, ADAPTER, tmp_path / "lora", base=BASE)
    else:
        assert cli.main(["convert", str(ADAPTER), str(ADAPTER), str(tmp_path / "lora"), "--base", str(BASE)]) == 0
    plain = peft.PeftModel.from_pretrained(load_base(), tmp_path / "lora").eval()
    assert plain.peft_config["default"].r == 4
    expected = output(trained_in_float64(), TOKENS)
    assert moved(expected, output(plain, TOKENS)) <= allowed()


def test_a_residual_checkpoint_verifies() -> None:
    found = pk.verify_checkpoint(BASE, RESIDUAL, progress=False)
    assert found == []
    assert sorted(layer.name for layer in found.layers) == sorted(LAYERS)
    assert found.copied == 10


def test_a_residual_checkpoint_loads_with_plain_peft() -> None:
    original = output(load_base().double(), TOKENS)
    residual = transformers.LlamaForCausalLM.from_pretrained(RESIDUAL, dtype=torch.bfloat16).eval()
    assert moved(original, output(residual, TOKENS)) > 3 * allowed()
    model = peft.PeftModel.from_pretrained(residual, RESIDUAL / "pissa_init").eval()
    assert moved(original, output(model, TOKENS)) <= allowed()


def test_reports_are_read() -> None:
    for folder in (ADAPTER, RESIDUAL / "pissa_init"):
        report = pk.Report.read(folder / "pissa_report.json")
        assert sorted(layer.name for layer in report.layers) == sorted(LAYERS)
        assert all(layer.rank == 2 and layer.certificate.converged for layer in report.layers)
