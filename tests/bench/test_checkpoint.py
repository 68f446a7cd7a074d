"""The benchmark of checkpoints on disk: what it makes, what its gate refuses, what a row and the table say."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bench.__main__ import main
from bench.checkpoints import folder as checkpoint_folder
from bench.checkpoints.child import DEFAULT, QUANTIZED
from bench.checkpoints.folder import checkpoint_of, distinct_projections, projections
from bench.checkpoints.gate import Folder, Verdict, check_result
from bench.checkpoints.run import Checkpoint
from bench.checkpoints.table import table
from bench.harness import gate
from bench.harness.benchmark import parse
from bench.harness.rows import read_rows
from bench.harness.table import OURS
from bench.models.llama import ModelCase
from pissa_kernels.cli import main as cli

CASE = ModelCase(layers=1, width=256, inner=512, groups=1, rank=4)
TINY = ["--layers", "1", "--width", "256", "--inner", "512", "--groups", "1", "--rank", "4", "--repeats", "1"]
ADAPTER = "pissa_init/adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def whole_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("result") / "out"
    assert cli.main(["init", str(checkpoint_of(CASE)), str(out), "--rank", "4"]) == 0
    return out


@pytest.fixture
def result(whole_result: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole_result, tmp_path / "out"))


def judged(out: Path) -> Verdict:
    return check_result(OURS, checkpoint_of(CASE), out, projections(CASE), distinct_projections(CASE))


def test_a_checkpoint_is_made_once_and_transformers_loads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_folder, "SHARD_BYTES", 1 << 20)
    case = ModelCase(layers=2, width=128, inner=256, groups=1, rank=4, distinct=1)
    folder = checkpoint_of(case)
    assert len(list(folder.glob("*.safetensors"))) > 2
    weights, whole = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict(), case.build()
    case.fill(whole)
    for name in projections(case):
        assert torch.equal(weights[f"{name}.weight"], whole.state_dict()[f"{name}.weight"]), name
    assert distinct_projections(case) == [name for name in projections(case) if ".layers.0." in name]
    assert weights["model.embed_tokens.weight"].std() > 0.01
    monkeypatch.setattr(ModelCase, "weight", None)  # called no more
    assert checkpoint_of(case) == folder


def test_an_interrupted_checkpoint_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ModelCase(layers=1, width=128, inner=128, groups=1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ModelCase, "weight", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_of(case)
    assert Folder(checkpoint_of(case)).read("model.norm.weight").eq(1).all()


def test_a_good_result_is_green(result: Path) -> None:
    verdict = judged(result)
    assert verdict.reason is None
    assert verdict.energy_deficit is not None
    assert verdict.energy_deficit <= 1e-5
    assert verdict.rounding is not None
    assert verdict.rounding <= 1


def flip(tensor: torch.Tensor) -> None:
    tensor.copy_(tensor.flip(1).clone())


def poison(tensor: torch.Tensor) -> None:
    tensor[0, 0] = torch.nan


def double(tensor: torch.Tensor) -> None:
    tensor.mul_(2)


@pytest.mark.parametrize(
    ("file", "part", "damage", "reason"),
    [
        (ADAPTER, "q_proj.lora_A", flip, "energy deficit"),
        (ADAPTER, "v_proj.lora_A", poison, "energy deficit nan"),
        (ADAPTER, "o_proj.lora_B", double, "reconstruction error"),
        ("*.safetensors", "up_proj", double, "reconstruction error"),
        ("*.safetensors", "embed_tokens", flip, "model.embed_tokens.weight has changed"),
    ],
)
def test_a_damaged_tensor_is_red(
    result: Path, file: str, part: str, damage: Callable[[torch.Tensor], None], reason: str
) -> None:
    for path in result.glob(file):
        tensors = load_file(path)
        for name in tensors:
            if part in name:
                damage(tensors[name])
        save_file(tensors, path, {"format": "pt"})
    assert str(judged(result).reason).startswith(reason)


def test_a_result_without_an_adapter_is_red(result: Path) -> None:
    (result / ADAPTER).unlink()
    assert judged(result).reason == "the names of the result's tensors are not those of the checkpoint and its adapter"
    (result / "pissa_init" / "adapter_config.json").unlink()
    assert str(judged(result).reason).startswith("the result cannot be read: FileNotFoundError")


@pytest.mark.slow
def test_rows_and_table_of_a_tiny_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["checkpoint", *TINY, "--out", str(out)]) == 0
    rows = {row["provider"]: row for row in read_rows(out)}
    assert list(rows) == list(DEFAULT)
    for row in rows.values():
        assert row["wall_s"] > row["imports_s"] + row["work_s"] > row["work_s"] > 0
        assert row["cpu_s"] > row["work_cpu_s"] > 0
        assert row["repeats"] == len(row["runs"]) == 1
        assert row["peak_mib"] > 0
        assert row["limit_mib"] == 100 + 4 * 256 * 512 * 2 / 2**20
        assert row["imported_mib"] > 0
    assert rows["ours pissa"]["energy_deficit"] <= 1e-5 < 1e-3 < rows["peft pissa_niter_4"]["energy_deficit"]
    assert rows["ours pissa"]["rounding"] <= 1
    printed = capsys.readouterr().out
    assert "llama-1x256x512-r4-bf16, 0.0 GB" in printed
    assert "peft pissa_niter_4" in printed
    assert not list(gate.CACHE.glob("checkpoint-result-*"))


def test_a_process_that_fails_gets_a_red_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    out = tmp_path / "rows.jsonl"
    assert main(["checkpoint", *TINY, "--out", str(out), "--providers", "ours pissa"]) == 1
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["reason"] == "the process ended with 1: no message"
    assert row["wall_s"] is None
    assert "red: the process ended" in table([row])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "100"], "--width must be a multiple of 512"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--dtype", "int8"], "--dtype must be one of bf16, fp16, fp32"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["checkpoint", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_sweep_has_fewer_layers_and_more() -> None:
    assert [case.layers for case, _ in parse(Checkpoint(), ["--sweep"]).selection] == [4, 22, 44]


def test_quantized_residuals_pass_a_gate_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    command = ["init", str(checkpoint_of(CASE)), str(out), "--rank", "4", "--quantize", "nf4", "--double-quant"]
    assert cli.main(command) == 0

    def verdict() -> Verdict:
        return check_result(QUANTIZED, checkpoint_of(CASE), out, projections(CASE), distinct_projections(CASE))

    assert verdict() == Verdict(None)
    report = out / "pissa_init" / "pissa_report.json"
    record = json.loads(report.read_text())
    layer = next(each for each in record["layers"] if each["name"] in distinct_projections(CASE))
    layer["quantization"]["error"] *= 1.001
    report.write_text(json.dumps(record))
    assert "the report's error is" in str(verdict().reason)
