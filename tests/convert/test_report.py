"""The report of a conversion, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pissa_kernels as pk
from pissa_kernels.cli import main as cli
from pissa_kernels.convert.convert import convert_adapter
from pissa_kernels.convert.report import ConversionReport

from .adapters import make


def test_the_report(copied: Path) -> None:
    done = convert_adapter(copied / "trained", copied / "residual", copied / "lora", rank=3, base=copied / "base")
    assert isinstance(done, ConversionReport)
    assert isinstance(done, pk.Report)
    assert repr(done) == f"<ConversionReport: {done.summary()}>"
    assert done.summary().startswith(f"{copied}/lora: a plain LoRA of {copied}/base, 14 layers, rank 3, loss ")
    assert done.summary() in done.table().splitlines()
    record = done.to_dict()
    assert list(record) == ["out", "base", "layers", "loss", "carried", "checked", "notes"]
    assert [list(layer) for layer in record["layers"]] == [["name", "shape", "rank", "scaling", "loss"]] * 14
    done.write(copied / "report.json")
    assert json.loads((copied / "report.json").read_text()) == json.loads(done.to_json()) == record
    with pytest.raises(TypeError, match=r"a conversion report cannot be read back"):
        ConversionReport.read(copied / "report.json")
    with pytest.raises(TypeError, match=r"a conversion report cannot be read back"):
        ConversionReport.from_dict(record)
    with pytest.raises(ValueError, match=r"report\.json is not a report"):
        pk.Report.read(copied / "report.json")


def test_the_table_ends_with_notes_and_copied_tensors(tmp_path: Path) -> None:
    make(tmp_path, use_dora=True, rank_pattern={"q_proj": 6, "down_proj": 2})
    done = convert_adapter(tmp_path / "residual/pissa_init", tmp_path / "residual", tmp_path / "lora")
    *_, summary, copied, first, second = done.table().splitlines()
    assert "a plain LoRA of a model that is not named, 14 layers, rank 4 to 12, loss 0.00e+00" in summary
    assert copied == "14 other tensors were copied"
    assert [first, second] == [f"note: {note}" for note in done.notes]


def test_command_line(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", *(str(copied / name) for name in ("trained", "residual", "lora"))]
    base = ["--base", str(copied / "base")]
    assert cli.main([*arguments, "--rank", "3", *base]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].split() == ["layer", "rank", "loss"]
    assert lines[2].startswith("model.layers.0.mlp.down_proj")
    assert f"{copied}/lora: a plain LoRA of {copied}/base, 14 layers, rank 3, loss " in printed.out
    assert "within 0." in printed.out
    assert cli.main([*arguments, *base, "--force", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["loss"] == 0
    assert record["base"] == str(copied / "base")
    assert record["layers"][0] == {
        "name": "model.layers.0.mlp.down_proj", "shape": [64, 192], "rank": 8, "scaling": 1.0, "loss": 0.0,
    }  # fmt: skip
    for more, code, words in (
        ([], 2, "exists and is not an empty folder"),
        (["--rank", "9", "--force"], 1, "rank 9 is out of range; accepted is 1 to 8"),
        (["--base", str(copied / "residual"), "--force"], 1, "times the rounding bound"),
    ):
        assert cli.main([*arguments, *more]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
