"""Quantized results in stock transformers and PEFT, against stock transformers' own quantization of the original."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import pissa_kernels as pk

from ..support.checkpoints import factors, layers, save, tensors
from ..support.models import build

RANK = 8


@dataclass(frozen=True)
class Case:
    """A model, a format, and the layers with an adapter.

    Attributes:
        model: name for :func:`tests.support.models.build`.
        dtype: of the checkpoint.
        options: of init.
        stock: the same format for transformers.
        targets: names of the adapted layers.
        quantized: number of layers that transformers quantizes, and of those with an adapter among them.
    """

    model: str
    dtype: torch.dtype
    options: dict[str, Any]
    stock: dict[str, Any]
    targets: list[str]
    quantized: tuple[int, int]

    def config(self) -> Any:
        return transformers.BitsAndBytesConfig(**self.stock)


FOUR_BIT = {"load_in_4bit": True}
CASES = {
    "llama-nf4-double": Case(
        "llama",
        torch.bfloat16,
        {"quantize": "nf4", "double_quant": True},
        {
            **FOUR_BIT,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        ["q_proj", "down_proj", "lm_head"],
        (7, 2),
    ),
    "gpt2-nf4": Case(
        "gpt2",
        torch.float32,
        {"quantize": "nf4", "quant_iterations": "auto"},
        {**FOUR_BIT, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        ["c_attn", "c_fc"],
        (4, 2),
    ),
    "mistral-fp4": Case(
        "mistral",
        torch.float16,
        {"quantize": "fp4", "quant_iterations": 1},
        {**FOUR_BIT, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float16},
        ["v_proj", "up_proj"],
        (7, 2),
    ),
    "llama-int8": Case(
        "llama", torch.bfloat16, {"quantize": "int8"}, {"load_in_8bit": True}, ["k_proj", "gate_proj"], (7, 2)
    ),
}


@dataclass(frozen=True)
class Result:
    """A case with its folders, and the models that stock transformers makes of them.

    Attributes:
        case: the case.
        base, out: folders of the original and of the result.
        original: modules of the original, in its dtype.
        loaded: modules of the result, as loaded.
        stock: modules of the original, quantized by transformers.
        saved: config of the latter, as JSON.
    """

    case: Case
    base: Path
    out: Path
    original: dict[str, nn.Module]
    loaded: dict[str, nn.Module]
    stock: dict[str, nn.Module]
    saved: dict[str, Any]


@pytest.fixture(scope="module", params=CASES)
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Result:
    case = CASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    base, out = save(build(case.model, case.dtype, width=64, layers=1), root / "base"), root / "out"
    pk.init_checkpoint(base, out, rank=RANK, target_modules=case.targets, progress=False, **case.options)
    auto = transformers.AutoModelForCausalLM
    stock = auto.from_pretrained(base, quantization_config=case.config(), dtype="auto")
    models = [auto.from_pretrained(base, dtype="auto"), auto.from_pretrained(out, dtype="auto"), stock]
    original, loaded, quantized = (dict(model.named_modules()) for model in models)
    return Result(case, base, out, original, loaded, quantized, json.loads(stock.config.to_json_string()))


def packed(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {
        name: module for name, module in modules.items() if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    }


def stored(module: nn.Module) -> dict[str, Tensor]:
    """Codes and statistics of a layer of bitsandbytes, but for the JSON."""
    weight: Any = module.weight
    if isinstance(weight, bnb.nn.Int8Params):
        return {"weight": weight.data, "SCB": weight.SCB}
    state = weight.quant_state.as_dict(packed=True)
    found = {f"weight.{name}": value for name, value in state.items() if not name.startswith("quant_state")}
    return {"weight": weight.data, **found}


def dequantized(module: nn.Module) -> Tensor:
    """The values of a layer, by bitsandbytes, in float64."""
    weight: Any = module.weight
    if isinstance(weight, bnb.nn.Int8Params):
        return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB).double()
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()


def original_weight(result: Result, name: str) -> Tensor:
    """(out, in) in float64."""
    weight = result.original[name].get_parameter("weight").detach().double()
    return weight.mT if type(result.original[name]).__name__ == "Conv1D" else weight


def test_loads_as_it_is_stored(result: Result) -> None:
    """Stock transformers makes layers of bitsandbytes of the same modules, with the file's codes and statistics."""
    modules, files = packed(result.loaded), tensors(result.out)
    assert modules.keys() == packed(result.stock).keys()
    assert len(modules) == result.case.quantized[0]
    for name, module in modules.items():
        for suffix, value in stored(module).items():
            assert torch.equal(files[f"{name}.{suffix}"], value), (name, suffix)
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            assert (state.dtype, tuple(state.shape)) == (
                result.case.dtype,
                tuple(original_weight(result, name).shape),
            )
            assert module.compute_dtype == result.case.dtype
    text = (result.out / "config.json").read_text()
    before = json.loads((result.base / "config.json").read_text())
    assert json.loads(text) == {**before, "quantization_config": result.saved["quantization_config"]}


def test_layers_without_adapter_are_those_of_transformers(result: Result) -> None:
    adapted = {layer["name"] for layer in layers(result.out)}
    plain = packed(result.stock).keys() - adapted
    assert len(plain) == result.case.quantized[0] - result.case.quantized[1]
    for name in plain:
        here, there = stored(result.loaded[name]), stored(result.stock[name])
        assert here.keys() == there.keys()
        assert all(torch.equal(here[suffix], there[suffix]) for suffix in here), name


def test_everything_else_is_the_original(result: Result) -> None:
    files, before = tensors(result.out), tensors(result.base)
    quantized = packed(result.loaded)
    changed = {f"{name}.weight" for name in (*quantized, *(layer["name"] for layer in layers(result.out)))}
    for name in before.keys() - changed:
        assert torch.equal(files[name], before[name])
        assert files[name].dtype == before[name].dtype
    for name in files.keys() - before.keys():
        assert name.rpartition(".weight.")[0] in quantized or name.rpartition(".")[0] in quantized, name
    for name, content in {path.name: path.read_bytes() for path in result.base.glob("*.json")}.items():
        if name not in ("config.json", "model.safetensors.index.json"):
            assert (result.out / name).read_bytes() == content


def test_errors_are_those_of_the_report(result: Result) -> None:
    """In float64, with what bitsandbytes dequantizes; and without PiSSA with what transformers quantizes."""
    report = [layer for layer in layers(result.out) if "quantization" in layer]
    assert len(report) == result.case.quantized[1]
    for layer in report:
        name, found = layer["name"], layer["quantization"]
        A, B = factors(result.out, name)
        assert (A.dtype, B.dtype) == (result.case.dtype, result.case.dtype)
        weight = original_weight(result, name)
        error = (weight - dequantized(result.loaded[name]) - B.double() @ A.double()).norm()
        without = (weight - dequantized(result.stock[name])).norm()
        # bitsandbytes dequantizes int8 by another order of the product
        tolerance = 1e-6 if result.case.options["quantize"] != "int8" else 1e-4
        assert found["error"] == pytest.approx(float(error), rel=tolerance)
        assert found["error_without"] == pytest.approx(float(without), rel=tolerance)
        assert error < without


def test_verified(result: Result) -> None:
    found = pk.verify_checkpoint(result.base, result.out, progress=False)
    assert not found
    assert len(found.quantized) == result.case.quantized[0]


def test_residual_of_a_layer_that_stays(result: Result) -> None:
    if "lm_head" not in result.case.targets:
        assert all("quantization" in layer for layer in layers(result.out))
        return
    A, B = factors(result.out, "lm_head")
    weight, residual = original_weight(result, "lm_head"), tensors(result.out)["lm_head.weight"]
    assert residual.dtype == result.case.dtype
    assert float((weight - residual.double() - B.double() @ A.double()).abs().max()) <= 2**-8 * float(
        residual.double().abs().max()
    )


def test_peft_adapts_it(result: Result) -> None:
    """Stock PEFT loads the adapter onto the loaded model, and computes W_q·x + s·B·A·x."""
    base = result.loaded[""]
    model = peft.PeftModel.from_pretrained(base, result.out, subfolder="pissa_init")
    config = json.loads((result.out / "pissa_init" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is False
    prefix = "base_model.model."
    for layer in layers(result.out):
        module: Any = model.get_submodule(prefix + layer["name"])
        assert type(module).__module__ == f"peft.tuners.lora.{'bnb' if 'quantization' in layer else 'layer'}"
        A, B = factors(result.out, layer["name"])
        assert torch.equal(module.lora_A["default"].weight, A.float())
        assert torch.equal(module.lora_B["default"].weight, B.float())
    name = next(layer["name"] for layer in layers(result.out) if "quantization" in layer)
    adapted: Any = model.get_submodule(prefix + name).train()  # in eval mode, bitsandbytes may repack the codes
    A, B = (factor.double() for factor in factors(result.out, name))
    x = torch.randn(3, A.shape[1], generator=torch.Generator().manual_seed(0))
    bias = getattr(adapted.get_base_layer(), "bias", None)
    expected = x.double() @ (dequantized(adapted.get_base_layer()) + B @ A).mT
    expected += 0 if bias is None else bias.double()
    with torch.no_grad():
        found = adapted(x.to(result.case.dtype)).double()
    rounding = 0.1 if result.case.options["quantize"] == "int8" else 0.03
    assert float((found - expected).norm() / expected.norm()) < rounding
    model.unload()
