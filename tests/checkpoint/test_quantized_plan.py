"""Which layers become quantized, what config.json says of them, and what is refused before and during the work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.cli import main as cli

from ..support.checkpoints import layers, save, tensors
from ..support.models import build
from ..support.refusing import refused

UP, QUERY = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def init(model: Path, out: Path, **options: Any) -> pk.CheckpointReport:
    settings = {"rank": 4, "target_modules": ["q_proj"], "quantize": "nf4", "progress": False, **options}
    return pk.init_checkpoint(model, out, **settings)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", torch.bfloat16, width=64, layers=1), tmp_path_factory.mktemp("source") / "model", "1GB")


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    """The files of ``source`` but for those that are left out, in a folder to change."""
    folder = tmp_path / "source" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def edit(model: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors", {"format": "pt"})


def config(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return record


def packed(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]


def test_weight_of_another_dtype_stays(model: Path, tmp_path: Path) -> None:
    """A float64 weight is copied, and named in config.json, so that transformers loads the layer as it is stored."""
    edit(model, lambda found: {**found, f"{UP}.weight": found[f"{UP}.weight"].double()})
    report = init(model, tmp_path / "out")
    assert f"stay as they are, as they are not tensors that can be quantized: {UP}" in report.notes
    skipped = config(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"]
    assert {UP, "lm_head"} <= set(skipped)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    assert packed(loaded) == [name for name in packed(stock) if name != UP]
    weight = load_file(model / "model.safetensors")[f"{UP}.weight"]
    assert torch.equal(loaded.get_submodule(UP).weight, weight.bfloat16())
    assert not pk.verify_checkpoint(model, tmp_path / "out", progress=False)


def test_dtype_that_the_config_does_not_name(model: Path, tmp_path: Path) -> None:
    """transformers would take the dtype of the first tensor, which is a float32 scale in the result."""
    record = config(model)
    del record["dtype"]
    (model / "config.json").write_text(json.dumps(record))
    init(model, tmp_path / "out")
    assert config(tmp_path / "out")["dtype"] == "bfloat16"
    assert config(tmp_path / "out")["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert not pk.verify_checkpoint(model, tmp_path / "out", progress=False)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_names_without_the_prefix_of_the_base_model(quantize: str, tmp_path: Path) -> None:
    """As GPT-2's on the hub: transformers finds the statistics of a weight under such names too."""
    folder = tmp_path / "model"
    build("gpt2", torch.float32, width=64, layers=1).save_pretrained(folder)
    edit(folder, lambda found: {name.removeprefix("transformer."): value for name, value in found.items()})
    report = init(folder, tmp_path / "out", target_modules=["c_attn"], quantize=quantize)
    assert [layer.name for layer in report.layers] == ["transformer.h.0.attn.c_attn"]
    files = tensors(tmp_path / "out")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        weight = loaded.get_submodule(f"transformer.h.0.{name}").weight
        assert torch.equal(weight.data, files[f"h.0.{name}.weight"])
    assert not pk.verify_checkpoint(folder, tmp_path / "out", progress=False)


def test_class_that_the_config_does_not_name(model: Path, tmp_path: Path) -> None:
    """The tensors decide on the class, and the modules that stay are recorded by name."""
    (model / "config.json").write_text(json.dumps({**config(model), "architectures": ["LlamaModel"]}))
    init(model, tmp_path / "out")
    assert "lm_head" in config(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(packed(loaded)) == 7


@pytest.mark.parametrize("block", [32, 1024])
def test_block_sizes(block: int, source: Path, tmp_path: Path) -> None:
    init(source, tmp_path / "out", quant_block=block)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight: Any = loaded.get_submodule(QUERY).weight
    assert weight.quant_state.blocksize == block
    assert len(weight.quant_state.absmax) == -(-64 * 64 // block)
    assert not pk.verify_checkpoint(source, tmp_path / "out", progress=False)


def test_nuclear_norms(source: Path, tmp_path: Path) -> None:
    init(source, tmp_path / "out", nuclear=True)
    (layer,) = layers(tmp_path / "out")
    found = layer["quantization"]
    assert found["error"] < found["nuclear_error"] < found["nuclear_error_without"]
    assert found["nuclear_error"] <= 8 * found["error"], "‖E‖_* ≤ √64·‖E‖_F"


# Refused


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--double-quant"], "double_quant needs quantize, one of nf4, fp4, int8", 1),
        (["--quant-iterations", "auto"], "quant_iterations needs quantize", 1),
        (["--quant-block", "128"], "quant_block needs quantize", 1),
        (["--nuclear"], "nuclear needs quantize", 1),
        (["--quantize", "int8", "--double-quant"], "double_quant is an option of nf4 and fp4", 1),
        (["--quantize", "int8", "--quant-block", "128"], "quant_block is an option of nf4 and fp4", 1),
    ],
)
def test_options(
    arguments: list[str], words: str, code: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, words, model, tmp_path / "out", *arguments, code=code)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantize", "nf5"], "--quantize: invalid choice: 'nf5'"),
        (["--quantize", "nf4", "--quant-block", "100"], "--quant-block: invalid choice: 100"),
        (["--quantize", "nf4", "--quant-iterations", "0"], "--quant-iterations: must be 1 or more"),
        (["--quantize", "nf4", "--quant-iterations", "all"], "--quant-iterations: invalid"),
    ],
)
def test_usage(arguments: list[str], words: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["init", str(model), "out", *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "nf5"}, "quantize must be one of nf4, fp4, int8, got 'nf5'"),
        ({"quant_block": 100}, "quant_block must be one of 32, 64, .*, got 100"),
        ({"quant_iterations": 0}, "quant_iterations must be an integer ≥ 1 or 'auto', got 0"),
        ({"quant_iterations": "5"}, "quant_iterations must be an integer ≥ 1 or 'auto', got '5'"),
    ],
)
def test_arguments(options: dict[str, Any], words: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        init(model, tmp_path / "out", **options)


def test_without_bitsandbytes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    words = r"--quantize needs bitsandbytes .*: pip install 'pissa-kernels\[quantize\]'$"
    refused(capsys, words, model, tmp_path / "out", "--quantize", "nf4")


def test_odd_number_of_elements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=33, n_head=3, n_layer=1, n_inner=33, vocab_size=10, n_positions=8)
    )
    model.save_pretrained(tmp_path / "source" / "model")
    words = r"layer 'transformer\.h\.0\.\S+', weight \(33, \d+\): nf4 packs pairs of values .* has \d+"
    refused(capsys, words, tmp_path / "source" / "model", tmp_path / "out", "--quantize", "nf4")


def test_nothing_to_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm_head alone, which transformers leaves as it is."""
    model = build("llama", torch.bfloat16, width=64, layers=1)
    model.config.num_hidden_layers = 0
    transformers.LlamaForCausalLM(model.config).save_pretrained(tmp_path / "source" / "model")
    words = "transformers quantizes no layer of a LlamaForCausalLM; leave --quantize out"
    arguments = ("--target-modules", "lm_head", "--quantize", "nf4")
    refused(capsys, words, tmp_path / "source" / "model", tmp_path / "out", *arguments)


@pytest.mark.parametrize("layer", [UP, QUERY])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_nan_in_a_weight(
    layer: str, quantize: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a layer with an adapter or without one."""

    def spoil(found: dict[str, Tensor]) -> dict[str, Tensor]:
        found[f"{layer}.weight"][3, 5] = float("nan")
        return found

    edit(model, spoil)
    words = f"layer '{layer}', weight .*; the unfinished result is deleted: repair the weight$"
    refused(capsys, words, model, tmp_path / "out", "--quantize", quantize, "--target-modules", "q_proj")


def test_value_beyond_float16_in_int8(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(model, lambda found: {**found, f"{UP}.weight": found[f"{UP}.weight"] * 1e6})
    words = f"layer '{UP}', weight .*: int8 rounds the weight to float16 first, whose range it exceeds"
    refused(capsys, words, model, tmp_path / "out", "--quantize", "int8", "--target-modules", "q_proj")


def test_quantized_result_is_refused_as_a_source(source: Path, tmp_path: Path) -> None:
    init(source, tmp_path / "out")
    with pytest.raises(ValueError, match="is a residual already"):
        init(tmp_path / "out", tmp_path / "again")
    (tmp_path / "out" / "pissa_manifest.json").unlink()
    for path in (tmp_path / "out" / "pissa_init").iterdir():
        path.unlink()
    (tmp_path / "out" / "pissa_init").rmdir()
    with pytest.raises(TypeError, match=r"is quantized \(bitsandbytes\)"):
        init(tmp_path / "out", tmp_path / "again")


# The command line


def test_commands(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["init", str(source), str(out), "--rank", "4", "--target-modules", "q_proj", "lm_head"]
    command += ["--quantize", "nf4", "--double-quant", "--quant-iterations", "2"]
    assert cli.main([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "2 tensors become residuals, 4 are copied" in text
    assert "nf4, blocks of 64, double quantization: 7 weights, 6 of them without an adapter" in text
    assert not out.exists()
    assert cli.main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["quantization"]["kind"], plan["quantization"]["double"]) == ("nf4", True)
    assert len(plan["quantized"]) == 7
    assert f"{UP}.weight" not in plan["copied"]
    assert cli.main(command) == 0
    found = layers(out)[0]["quantization"]
    saved = f"{100 * (1 - found['error'] / found['error_without']):.1f} % less quantization error in 1 layer,"
    assert saved in capsys.readouterr().out.splitlines()[-2]
    assert plan["bytes"] == sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert cli.main([*command, "--force", "--json"]) == 0
    *records, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert last["quantization"]["error"] == pytest.approx(found["error"], rel=1e-12)
    assert {record["tensor"] for record in records if "statistics" in record} == set(plan["quantized"])
    assert cli.main(["verify", str(source), str(out)]) == 0
    text = capsys.readouterr().out
    assert "1 residuals, 7 quantized weights, 4 tensors copied bit for bit, 7 other files: every byte" in text
    assert cli.main(["verify", str(source), str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [layer["adapted"] for layer in record["quantized"]] == [True] + [False] * 6
    assert record["quantized"][0]["error"] == pytest.approx(found["error"], rel=1e-6)
