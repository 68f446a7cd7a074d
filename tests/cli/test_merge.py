"""The merge command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pissa_kernels.cli.main import main

from ..support.checkpoints import tensors


def test_table_and_json(written: Path, pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", str(written), str(written / "pissa_init"), str(tmp_path / "merged")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].split() == ["layer", "shape", "from", "dtype", "rank"]
    (row,) = (line for line in lines if "down_proj" in line)
    assert row.split() == ["model.layers.0.mlp.down_proj", "32×96", "bfloat16", "4"]
    assert lines[-1].startswith(f"{tmp_path}/merged: a full checkpoint of 0.0 MiB, 7 layers merged, 5 other tensors")
    assert tensors(tmp_path / "merged").keys() == tensors(pristine).keys()
    assert main([*arguments, "--force", "--json", "--dtype", "float32", "--workers", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record) == ["layers", "out", "dequantized", "replaced", "copied", "size", "notes"]
    assert next(layer for layer in record["layers"] if "down_proj" in layer["name"]) == {
        "name": "model.layers.0.mlp.down_proj", "tensor": "model.layers.0.mlp.down_proj.weight", "shape": [32, 96],
        "dtype": "float32", "rank": 4, "scaling": 1.0, "quantized": None,
    }  # fmt: skip
    assert {value.dtype for value in tensors(tmp_path / "merged").values()} == {torch.float32}


def test_errors_are_one_line(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    adapter = str(written / "pissa_init")
    for arguments, code, words in (
        ([str(written), adapter, str(tmp_path / "full")], 2, "exists and is not an empty folder"),
        ([str(written), str(tmp_path), str(tmp_path / "merged")], 2, "is not an adapter folder"),
        ([str(tmp_path / "none"), adapter, str(tmp_path / "merged")], 2, "does not exist"),
    ):
        assert main(["merge", *arguments]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(written), adapter, str(tmp_path / "merged"), "--dtype", "int8"])
    assert ended.value.code == 2
    assert not (tmp_path / "merged").exists()
