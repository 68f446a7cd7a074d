"""What a plain LoRA of the 16-bit model drops where the residual is quantized, against float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import safe_open
from safetensors.torch import save_file

import pissa_kernels as pk
from pissa_kernels.cli.main import main
from pissa_kernels.convert.report import ConversionReport
from pissa_kernels.peft.saving import sidecar

from ..support.adapted import lora_layers
from ..support.checkpoints import factors, tensors
from ..support.merging import adapt, quantize, residual, train
from ..support.models import build
from .adapters import make, rewrite

pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")


@pytest.fixture(scope="module", params=["llama nf4", "gpt2 nf4", "llama int8"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as base, its quantized residual as out, and the adapter trained on it."""
    name, kind = request.param.split()
    folder = tmp_path_factory.mktemp("dropped")
    out = quantize(residual(folder, name), folder / "out", kind)
    train(adapt(out, out / "pissa_init"), folder / "trained")
    return folder


@pytest.fixture(scope="module")
def norms(folders: Path) -> dict[str, tuple[float, float, float]]:
    """‖E‖_F, ‖ΔW‖_F and ‖W‖_F of each layer in float64; PEFT dequantizes."""
    base, found = tensors(folders / "base"), {}
    for name, layer in lora_layers(adapt(folders / "out", folders / "trained")).items():
        module = layer.get_base_layer()
        W_q = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None)).detach().double()
        W = base[f"{name}.weight"].double()
        A0, B0 = (factor.double() for factor in factors(folders / "out", name))
        A, B = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
        s = layer.scaling["default"]
        W = W.mT if name.startswith("transformer") else W  # Conv1D
        found[name] = tuple(float(each.norm()) for each in (W - W_q - s * B0 @ A0, s * (B @ A - B0 @ A0), W))
    return found


def convert(folders: Path, lora: Path, **options: Any) -> ConversionReport:
    return pk.convert_adapter(folders / "trained", folders / "out", lora, **options)


def record(out: Path, errors: dict[str, float]) -> None:
    """Write ‖E‖_F of each layer into the report, as ``init`` does."""
    path = out / "pissa_init" / "pissa_report.json"
    report = json.loads(path.read_text())
    for layer in report["layers"]:
        layer["quantization"] = about(errors[layer["name"]])
    path.write_text(json.dumps(report))


def about(error: float) -> dict[str, Any]:
    return {
        "scheme": "nf4, blocks of 64", "error": error, "error_without": 2 * error, "iterations": 5,
        "nuclear_error": None, "nuclear_error_without": None,
    }  # fmt: skip


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders, tmp_path / "copied"))


def close(found: float | None, expected: float) -> bool:
    return found is not None and math.isclose(found, expected, rel_tol=1e-5)


def test_measured_with_the_original_model(
    folders: Path, norms: dict[str, tuple[float, float, float]], tmp_path: Path
) -> None:
    done = convert(folders, tmp_path / "lora", base=folders / "base")
    assert done.checked is None
    assert {layer.name for layer in done.layers} == norms.keys()
    for layer in done.layers:
        error, change, weight = norms[layer.name]
        assert layer.dropped is not None
        assert close(layer.dropped.error, error)
        assert close(layer.dropped.of_change, error / change)
        assert close(layer.dropped.of_weight, error / weight)
    error, change, weight = (math.hypot(*column) for column in zip(*norms.values(), strict=True))
    assert done.dropped is not None
    assert close(done.dropped.error, error)
    assert close(done.dropped.of_change, error / change)
    assert close(done.dropped.of_weight, error / weight)
    assert 1e-3 < error / weight < 0.2
    *_, line = done.table().splitlines()
    assert line == done.dropped.describe()
    assert line.endswith(
        f"is {error:.3g}, {100 * error / change:.3g} % of ‖ΔW‖_F and {100 * error / weight:.3g} % of ‖W‖_F"
    )
    assert done.table().splitlines()[0].split() == ["layer", "rank", "loss", "‖E‖/‖ΔW‖", "‖E‖/‖W‖"]


def test_recorded(copied: Path, norms: dict[str, tuple[float, float, float]], tmp_path: Path) -> None:
    """Without the original model the report's errors are taken, with it the measured ones, which have to agree."""
    record(copied / "out", {name: error for name, (error, _, _) in norms.items()})
    done = convert(copied, tmp_path / "lora")
    for layer in done.layers:
        error, change, _ = norms[layer.name]
        assert layer.dropped is not None
        assert layer.dropped.error == error
        assert close(layer.dropped.of_change, error / change)
        assert layer.dropped.of_weight is None
    assert not any("is quantized" in note for note in done.notes)
    assert done.dropped is not None
    assert done.dropped.describe() in done.table().splitlines()
    assert done.dropped.describe().endswith("% of ‖ΔW‖_F")
    assert convert(copied, tmp_path / "other", base=copied / "base").dropped is not None
    record(copied / "out", {name: 0.99 * error for name, (error, _, _) in norms.items()})
    words = (
        r"layer '\S+': W_q \+ s·B₀·A₀ of \S+out differs from W of \S+base by \S+ in the Frobenius norm, .*its report"
    )
    with pytest.raises(ValueError, match=words):
        convert(copied, tmp_path / "third", base=copied / "base")
    assert not (tmp_path / "third").exists()


def test_another_model_is_refused(folders: Path, tmp_path: Path) -> None:
    name = "gpt2" if (folders / "base" / "config.json").read_text().count("GPT2") else "llama"
    model = build(name, torch.bfloat16, 64, 1)
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"layer '\S+': W_q \+ s·B₀·A₀ of \S+out differs from W of \S+base"):
        convert(folders, tmp_path / "lora", base=tmp_path / "base")


def test_unknown(folders: Path, tmp_path: Path) -> None:
    """Neither the original model nor a record of the error."""
    done = convert(folders, tmp_path / "lora")
    assert done.dropped is None
    assert any(f"{folders}/out is quantized, and the plain LoRA drops" in note for note in done.notes)


def test_a_config_that_does_not_say_how_the_base_is_stored(copied: Path, tmp_path: Path) -> None:
    """PEFT may save either for layers that were ``Conv1D`` before they were quantized; c_proj is square."""
    expected = convert(copied, tmp_path / "lora", base=copied / "base").dropped
    for index, folder in enumerate(("trained", "out/pissa_init")):
        config = json.loads((copied / folder / "adapter_config.json").read_text())
        rewrite(copied / folder, fan_in_fan_out=not config["fan_in_fan_out"])
        assert convert(copied, tmp_path / f"{index}", base=copied / "base").dropped == expected


def test_the_command_says_it(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", *(str(folders / name) for name in ("trained", "out")), str(tmp_path / "lora")]
    assert main([*arguments, "--base", str(folders / "base"), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err.startswith(
        "pissa-kernels: the residual is quantized, and the plain LoRA drops E = W − W_q − s·B"
    )
    assert printed.err.count("\n") == 1
    assert found["dropped"].keys() == found["layers"][0]["dropped"].keys() == {"error", "of_change", "of_weight"}
    assert math.isclose(
        math.hypot(*(layer["dropped"]["error"] for layer in found["layers"])), found["dropped"]["error"]
    )


def test_the_sidecar_has_the_record(tmp_path: Path) -> None:
    """Of a model that was quantized in memory, there is no residual checkpoint."""
    make(tmp_path, width=32, layers=1)
    path = tmp_path / "trained" / "pissa_initial.safetensors"
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        report = json.loads(file.metadata()["pissa_kernels"])
    for index, layer in enumerate(report["layers"]):
        layer["quantization"] = about(1.0 + index)
    text = json.dumps(report)
    save_file(found, path, metadata={"format": "pt", "pissa_kernels": text, "sha256": sidecar.digest(text, found)})
    done = pk.convert_adapter(tmp_path / "trained", tmp_path / "trained", tmp_path / "lora")
    expected = {layer["name"]: layer["quantization"]["error"] for layer in report["layers"]}
    assert {layer.name: layer.dropped.error for layer in done.layers if layer.dropped is not None} == expected
    assert done.dropped is not None
    assert math.isclose(done.dropped.error, math.hypot(*expected.values()))
