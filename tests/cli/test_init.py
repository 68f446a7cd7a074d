"""``pissa-kernels init`` as a user runs it: its output and its exit status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.cli import main as cli
from pissa_kernels.examples.demo import demo_model

from ..support.checkpoints import REPORT, contents, small, tensors, witness

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pissa_kernels", "init", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small(tmp_path_factory.mktemp("source") / "model")
    (folder / "pytorch_model.bin").unlink()
    return folder


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    done = run(demo_model(), tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "neither a bar nor warnings"
    *lines, last = map(json.loads, done.stdout.splitlines())
    before = tensors(Path(demo_model()))
    assert sorted(line["tensor"] for line in lines) == sorted(before)
    assert {(line["event"], line["kept"]) for line in lines} == {("tensor", False)}
    assert (last["event"], last["layers"], last["tensors"], last["kept"]) == ("done", 37, len(before), 0)
    assert last["converged"]
    assert last["out"] == str(tmp_path / "out")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert {layer["name"] + ".weight" for layer in report["layers"]} == {
        line["tensor"] for line in lines if "layer" in line
    }
    done = subprocess.run(
        [sys.executable, "-m", "pissa_kernels", "report", tmp_path / "out"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, "the command finds and reads the report"


def test_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["init", str(model), str(out), "--rank", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "7 layers" in captured.out
    assert captured.out.splitlines()[-1].startswith(f"{out}: the residual model (")
    assert cli.main(["init", str(model), str(out), "--rank", "4", "--resume"]) == 0
    assert "12 of 12 tensors had been written by an earlier run" in capsys.readouterr().out


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing(as_json: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = witness(model)
    arguments = ["--rank", "4", "--dry-run", "--rank-pattern", "q_proj=2", *(["--json"] if as_json else [])]
    assert cli.main(["init", str(model), str(tmp_path / "a" / "out"), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert list(tmp_path.iterdir()) == []
    assert witness(model) == before
    if not as_json:
        assert "7 tensors become residuals, 5 are copied" in captured.out
        assert "nothing has been written" in captured.out
        return
    record = json.loads(captured.out)
    ranks = {target["name"]: target["rank"] for target in record["targets"]}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert sorted(ranks.values()) == [2, 4, 4, 4, 4, 4, 4]
    assert {target["tensor"] for target in record["targets"]} | set(record["copied"]) == set(tensors(model))
    # the run then writes as many bytes
    arguments.remove("--dry-run")
    assert cli.main(["init", str(model), str(tmp_path / "out"), *arguments]) == 0
    found = contents(tmp_path / "out")
    assert record["bytes"] == sum(len(found[name] or b"") for name in found if name.endswith(".safetensors"))


def test_files_that_are_left_out_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(model, tmp_path / "model"))
    (other / "pytorch_model.bin").write_bytes(b"weights")
    assert cli.main(["init", str(other), str(tmp_path / "out"), "--rank", "4"]) == 0
    words = "left out, as they hold weights that would not be residuals: pytorch_model.bin\n"
    assert capsys.readouterr().err == words
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/nowhere", "OUT"], 2, "/nowhere does not exist"),
        (["MODEL", "OUT", "--rank", "33"], 1, "got r=33"),
        (["MODEL", "OUT", "--rank", "0"], 2, "must be 1 or more"),
        (["MODEL", "OUT", "--init", "lora"], 2, "init_lora_weights should be 'pissa' or"),
        (["MODEL", "OUT", "--rank-pattern", "q_proj"], 2, "'q_proj' is not NAME=R"),
        (["MODEL", "OUT", "--rank-pattern", "q_proj=2.5"], 2, "'q_proj=2.5' is not NAME=R"),
        (["MODEL", "OUT", "--alpha-pattern", "=2"], 2, "'=2' is not NAME=A"),
        (["MODEL"], 2, "OUT"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], code: int, words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    try:
        ended = cli.main(["init", *(places.get(argument, argument) for argument in arguments)])
    except SystemExit as error:  # argparse's own
        ended = int(error.code or 0)
    assert ended == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert words in lines[0]
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
