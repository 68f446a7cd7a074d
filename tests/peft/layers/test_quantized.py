"""Layers that bitsandbytes has quantized, initialized from the original weights under the hook."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers
from tests.support.quantized import FORMATS, codes, dequantized, loaded, lora, saved

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("quantized") / "base")


@pytest.fixture(scope="module")
def originals(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}


def made(folder: Path, kind: str = "nf4", config: Any = None, **options: Any) -> tuple[Any, pk.PatchedPeft]:
    with pk.patch_peft(original=folder, **options) as report:
        return peft.get_peft_model(loaded(folder, kind), config or lora()), report


def product(layer: Any, name: str = "default") -> Tensor:
    A, B = (factor[name].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
    return layer.scaling[name] * B @ A


def inputs() -> Tensor:
    return torch.arange(24).reshape(2, 12) * 4


@pytest.mark.parametrize("kind", FORMATS)
def test_the_errors_are_those_of_the_stored_layers(kind: str, folder: Path, originals: dict[str, Tensor]) -> None:
    plain = {
        name: dequantized(module) for name, module in loaded(folder, kind).named_modules() if _is_quantized(module)
    }
    model, report = made(folder, kind)
    layers = dict(lora_layers(model))
    assert [entry.name for entry in report.layers] == list(layers)
    for entry in report.layers:
        W, layer, found = originals[f"{entry.name}.weight"], layers[entry.name], entry.quantization
        assert found is not None
        error = float((W - dequantized(layer.get_base_layer()) - product(layer)).norm())
        without = float((W - plain[entry.name]).norm())
        assert found.error == pytest.approx(error, rel=1e-4)
        assert found.error_without == pytest.approx(without, rel=1e-4)
        assert error < without
        assert 1 <= found.iterations <= 5
        assert found.scheme.startswith(kind)
        # energy of s·B·A relative to that of W
        assert entry.certificate.energy == pytest.approx(float((product(layer).norm() / W.norm()) ** 2), rel=1e-3)
        assert entry.certificate.converged


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


@pytest.mark.parametrize("kind", FORMATS)
def test_one_iteration_is_pissa_of_the_weight(kind: str, folder: Path, originals: dict[str, Tensor]) -> None:
    model, _ = made(folder, kind, quant_iterations=1)
    for name, layer in lora_layers(model):
        W = originals[f"{name}.weight"]
        best = float(torch.linalg.svdvals(W)[:8].square().sum())
        A = layer.lora_A["default"].weight.detach().double()
        Q, _ = torch.linalg.qr(A.mT)
        assert 1 - float((W @ Q).square().sum()) / best < 3e-6
        base = layer.get_base_layer()
        expected = _codes_of(W - product(layer), kind, base)
        if kind == "int8":  # rounded to float16 first, and the residual is float32 there: a few values are ties
            steps = (codes(base).int() - expected.int()).abs()
            assert int(steps.max()) <= 1
            assert float(steps.double().mean()) < 1e-3
        else:
            assert torch.equal(codes(base), expected)


def _codes_of(residual: Tensor, kind: str, base: Any) -> Tensor:
    """Codes of a residual by bitsandbytes' own layers."""
    if kind == "int8":
        return bnb.nn.Int8Params(residual.float(), requires_grad=False).to("cpu").data
    weight = base.weight
    return bnb.functional.quantize_4bit(
        residual.float(), blocksize=weight.blocksize, quant_type=kind, compress_statistics=weight.compress_statistics
    )[0]


def test_the_model_computes_nearer_to_the_original(folder: Path) -> None:
    import transformers

    original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantized, (model, _) = loaded(folder), made(folder)
    model.train()
    with torch.no_grad():
        truth, before, after = (each(inputs()).logits.float() for each in (original, quantized, model))
    assert float((after - truth).norm()) < 0.9 * float((before - truth).norm())


def test_settings_of_the_format_stay(folder: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
        ),
    )
    before = {name: module.weight for name, module in model.named_modules() if _is_quantized(module)}
    kept = {name: (weight.shape, weight.dtype, weight.quant_state.dtype) for name, weight in before.items()}
    with pk.patch_peft(original=folder):
        adapted = peft.get_peft_model(model, lora(), autocast_adapter_dtype=False)
    for name, layer in lora_layers(adapted):
        weight = layer.get_base_layer().weight
        assert weight is before[name]
        assert (weight.shape, weight.dtype, weight.quant_state.dtype) == kept[name]
        assert not weight.quant_state.nested
        W = _tensor(folder, f"{name}.weight").to(torch.float16).double()
        expected = _codes_of(W - product(layer), "nf4", layer.get_base_layer())
        assert torch.equal(weight.data.view(torch.uint8).flatten(), expected.flatten())


def _tensor(folder: Path, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_tensor(key)


@pytest.mark.parametrize("architecture", ["gpt2", "mistral"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", architecture)
    with pk.patch_peft(original=base) as report:
        model = peft.get_peft_model(loaded(base), lora(architecture))
    assert len(report.layers) == len(list(lora_layers(model)))
    for entry, (name, layer) in zip(report.layers, lora_layers(model), strict=True):
        W = _tensor(base, f"{name}.weight").double()
        W = W.mT if architecture == "gpt2" else W
        error = float((W - dequantized(layer.get_base_layer()) - product(layer)).norm())
        assert entry.quantization is not None
        assert entry.quantization.error == pytest.approx(error, rel=1e-4)
        assert error < entry.quantization.error_without


def test_a_checkpoint_with_the_prefix_of_another_class(tmp_path: Path) -> None:
    import transformers

    from tests.support.models import build

    config = build("bert", width=64, layers=1).config
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    with pk.patch_peft(original=tmp_path / "base") as report:
        model = peft.get_peft_model(loaded(tmp_path / "base", auto="AutoModel"), lora(target_modules=["query", "key"]))
    assert [entry.name for entry in report.layers] == [name for name, _ in lora_layers(model)]
    assert report.layers[0].name == "encoder.layer.0.attention.self.query"


def test_a_model_of_bare_layers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    W = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) / 8
    save_file({"0.weight": W}, tmp_path / "weights.safetensors")
    layer = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight.data = W.clone()
    model = nn.Sequential(layer.to("cpu")).train()
    with pk.patch_peft(original=tmp_path, batch=False) as report:
        model = peft.get_peft_model(model, lora(target_modules=["0"]))
    layer = model.base_model.model[0]
    assert report.layers[0].dtype == torch.float32
    error = float((W.double() - dequantized(layer.get_base_layer()) - product(layer)).norm())
    assert report.layers[0].quantization.error == pytest.approx(error, rel=1e-4)  # type: ignore[union-attr]


def test_a_snapshot_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pk.patch_peft(original="someone/model") as report:
        peft.get_peft_model(loaded(folder), lora(target_modules=["q_proj"]))
    assert [entry.name for entry in report.layers] == ["model.layers.0.self_attn.q_proj"]


def test_auto_stops_where_an_iteration_gains_little(folder: Path) -> None:
    _, five = made(folder)
    _, auto = made(folder, quant_iterations="auto")
    for first, other in zip(five.layers, auto.layers, strict=True):
        assert first.quantization is not None
        assert other.quantization is not None
        # five iterations certify the last one only, and so take a path of their own: a quarter of a percent apart
        nearer = other.quantization.error <= 1.0025 * first.quantization.error
        assert nearer or other.quantization.iterations < 5
    assert any(entry.quantization.iterations > 5 for entry in auto.layers)  # type: ignore[union-attr]


def test_nuclear_norms(folder: Path, originals: dict[str, Tensor]) -> None:
    model, report = made(folder, config=lora(target_modules=["q_proj"]), nuclear_norms=True)
    ((name, layer),) = lora_layers(model)
    E = originals[f"{name}.weight"] - dequantized(layer.get_base_layer()) - product(layer)
    found = report.layers[0].quantization
    assert found is not None
    assert found.nuclear_error == pytest.approx(float(torch.linalg.svdvals(E).sum()), rel=1e-4)
    assert found.nuclear_error < found.nuclear_error_without


def test_the_dequantized_weight_as_the_original(folder: Path) -> None:
    model = loaded(folder, "int8")
    before = {name: dequantized(module) for name, module in model.named_modules() if _is_quantized(module)}
    with (
        pk.patch_peft(original="dequantized") as report,
        pytest.warns(UserWarning, match="dequantized weight is taken for the original one"),
    ):
        model = peft.get_peft_model(model, lora())
    for entry, (name, layer) in zip(report.layers, lora_layers(model), strict=True):
        error = float((before[name] - dequantized(layer.get_base_layer()) - product(layer)).norm())
        assert entry.quantization is not None
        assert entry.quantization.error == pytest.approx(error, rel=1e-3)
    assert "MORE quantization error" in report.summary()


def test_a_report_is_written_and_read(folder: Path, tmp_path: Path) -> None:
    _, report = made(folder)
    report.write(tmp_path / "report.json")
    again = pk.Report.read(tmp_path / "report.json")
    assert [entry.quantization for entry in again.layers] == [entry.quantization for entry in report.layers]
    assert "less quantization error in 7 layers" in again.summary()
    heads, _, row, *_ = again.table().splitlines()
    assert heads.split()[-4:] == ["error", "saved,", "%", "iterations"]
    found = report.layers[0].quantization
    assert found is not None
    assert row.split()[-3:] == [f"{found.error:.3g}", f"{100 * found.saved:.1f}", str(found.iterations)]


def test_a_rank_above_the_width(folder: Path) -> None:
    with pk.patch_peft(original=folder) as report, pytest.warns(UserWarning, match="rank 32 instead of 50"):
        peft.get_peft_model(loaded(folder), lora(r=50, target_modules=["k_proj"]))
    assert [entry.rank for entry in report.layers] == [32]


# Refusals


def unchanged(model: Any, words: str, error: type[Exception], config: Any = None, **options: Any) -> None:
    """PEFT refuses to adapt a model, and it is as it was."""
    before = {name: codes(module) for name, module in model.named_modules() if _is_quantized(module)}
    with pk.patch_peft(**options), pytest.raises(error, match=words):
        peft.get_peft_model(model, config or lora())
    assert not any(True for _ in lora_layers(model))
    after = {name: module for name, module in model.named_modules() if _is_quantized(module)}
    assert all(torch.equal(before[name], codes(module)) for name, module in after.items())


def test_without_an_original(folder: Path) -> None:
    layer = r"layer 'model.layers.0.self_attn.q_proj', weight \(64, 64\)"
    words = rf"^Please initialize PiSSA under .*{layer}.*Params4bit.*original=FOLDER"
    unchanged(loaded(folder), words, TypeError)
    unchanged(loaded(folder, "int8"), "Int8Params.*original=FOLDER", TypeError)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_original_of_another_model(kind: str, folder: Path, tmp_path: Path) -> None:
    import transformers

    other = transformers.AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.data += 0.05 * parameter.std() * noise
    other.save_pretrained(tmp_path / "other")
    words = r"layer 'model.layers.0.\S+', weight .*not that of the original one .*quantized"
    with pk.patch_peft(original=tmp_path / "other"), pytest.raises(ValueError, match=words):
        peft.get_peft_model(loaded(folder, kind), lora())


def test_a_float32_original_of_an_int8_model(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", dtype=torch.float32)
    with pk.patch_peft(original=base) as report:  # rounded to bfloat16 when it was loaded
        peft.get_peft_model(loaded(base, "int8", torch.bfloat16), lora())
    assert len(report.layers) == 7


def test_a_residual_is_no_original_model(folder: Path, tmp_path: Path) -> None:
    model, _ = made(folder)
    pk.save_pissa(model, tmp_path / "residual")
    import transformers

    residual = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "residual")
    unchanged_words = "not that of the original one .*it is a residual already"
    with pk.patch_peft(original=folder), pytest.raises(ValueError, match=unchanged_words):
        peft.get_peft_model(residual, lora())


def test_originals_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder nor a model in the local cache"):
        pk.patch_peft(original=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        pk.patch_peft(original=tmp_path)
    wide = saved(tmp_path / "gpt2", "gpt2")
    unchanged(loaded(folder), "has no tensor of its own for the weight", ValueError, original=wide)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.down_proj.weight"
    (tmp_path / "cut").mkdir()
    save_file({**tensors, key: tensors[key][:, :32].contiguous()}, tmp_path / "cut" / "model.safetensors")
    words = rf"layer 'model.layers.0.mlp.down_proj', weight \(64, 192\).*\(64, 32\) for it, tensor '{key}'"
    unchanged(loaded(folder), words, ValueError, original=tmp_path / "cut")


@pytest.mark.parametrize("iterations", [0, -1, 2.5, True, "all", None])
def test_iterations_that_are_none(iterations: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="quant_iterations must be an integer ≥ 1 or 'auto'"):
        pk.patch_peft(original=folder, quant_iterations=iterations)


def test_dora_is_refused(folder: Path) -> None:
    unchanged(
        loaded(folder), "Dora takes norms from the stored weight", ValueError, lora(use_dora=True), original=folder
    )


def test_nan_in_the_original(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 5] = torch.nan
    shutil.copytree(folder, tmp_path / "nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    model = loaded(folder)
    before = codes(model.model.layers[0].self_attn.q_proj)
    with (
        pk.patch_peft(original=tmp_path / "nan"),
        pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj'"),
    ):
        peft.get_peft_model(model, lora(target_modules=["q_proj"]))
    assert torch.equal(codes(model.model.layers[0].self_attn.q_proj.get_base_layer()), before)
