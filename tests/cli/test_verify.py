"""``pissa-kernels verify`` as a user runs it: its table, its JSON, and its exit status."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pissa_kernels.cli.main import main

from ..support.checkpoints import ADAPTER, witness
from ..support.refusing import LAYER


@pytest.fixture
def damaged(written: Path, tmp_path: Path) -> Path:
    """A copy of the result with one wrong byte in the adapter, and another file."""
    out = Path(shutil.copytree(written, tmp_path / "out"))
    data = bytearray((out / ADAPTER).read_bytes())
    data[-1] ^= 1
    (out / ADAPTER).write_bytes(data)
    (out / "added.txt").touch()
    return out


def test_table(pristine: Path, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = witness(written)
    assert main(["verify", str(pristine), str(written), "--workers", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert re.fullmatch(r"layer +W_res \+ s·B·A, × rounding +energy, % +residual/σ₁ +check *", lines[0])
    [row] = [line for line in lines if line.startswith(LAYER)]
    assert re.fullmatch(rf"{LAYER} +0\.\d\d +\d\d\.\d\d +\de-0\d +holds *", row)
    assert sum(line.rstrip().endswith("holds") for line in lines) == 7
    assert re.fullmatch(
        r"7 residuals, 5 tensors copied bit for bit, \d other files: every byte is as written, and W_res \+ s·B·A is W "
        r"to one rounding",
        lines[-1],
    )
    assert witness(written) == before


def test_table_of_a_damaged_result(pristine: Path, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(pristine), str(damaged)]) == 1
    captured = capsys.readouterr()
    [line] = [line for line in captured.out.splitlines() if line.startswith("FAILED: ")]
    tensor = line.split(": ")[1]
    assert re.search(r"lora_[AB]\.weight's bytes are not those that were written", line)
    assert captured.err == f"pissa-kernels: error: {damaged} does not hold: {tensor}\n"
    assert captured.out.splitlines()[-1].endswith(" other files: 1 problem")
    assert "not part of the result: added.txt" in captured.out


def test_json(pristine: Path, written: Path, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(pristine), str(written), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["holds"] is True
    assert (len(record["layers"]), record["copied"], record["problems"], record["extra"]) == (7, 5, [], [])
    assert set(record["layers"][0]) == {"name", "reconstruction", "energy", "residual", "problem"}
    assert main(["verify", str(pristine), str(damaged), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    record = json.loads(captured.out)
    assert record["holds"] is False
    [[tensor, what]] = record["problems"]
    assert tensor.endswith("_proj.weight")
    assert "bytes are not those that were written" in what
    assert record["extra"] == ["added.txt"]


def test_mistakes_get_one_line(pristine: Path, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for base, out, words in [
        (pristine, pristine, "has no pissa_manifest.json: give a folder that pissa-kernels init has written"),
        (pristine, written / "missing", "missing does not exist"),
        (pristine, written / "config.json", "config.json is not a folder"),
        (written / "missing", written, "missing does not exist"),
        (written / "pissa_init", written, "is not a model folder: it has no config.json"),
    ]:
        assert main(["verify", str(base), str(out)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(f"pissa-kernels: error: .*{words}.*\n", captured.err)
