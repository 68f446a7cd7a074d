"""``init`` and ``demo`` on tiny models of many architectures: text, vision, speech, several modalities, experts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from pissa_kernels.cli.main import main

from ..support.architectures import ARCHITECTURES, difference, outputs, save_with_remote_code
from ..support.checkpoints import witness
from ..support.marks import slow_but

# Relative difference of outputs in float32. A layer whose adapter is not used makes one above 1e-1.
ROUNDING = 5e-6
RANK = 4

pytestmark = pytest.mark.usefixtures("one_thread_and_few_collections")
NAMES = slow_but(ARCHITECTURES, "gpt2", "llama", "bert", "qwen3_moe", "vit")


Source = Callable[[str], tuple[Path, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Folder of the model of an architecture, and its outputs as transformers loads it."""

    @functools.cache
    def make(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp(name) / "model"
        ARCHITECTURES[name].build().save_pretrained(folder)
        return folder, outputs(name, load(name, folder))

    return make


def load(name: str, folder: Path) -> Any:
    return getattr(transformers, ARCHITECTURES[name].model).from_pretrained(folder).eval()


def check_loads(name: str, out: Path, expected: dict[str, torch.Tensor]) -> None:
    """Check that transformers and PEFT load a folder to a model with these outputs, to which the adapter belongs."""
    residual = load(name, out)
    assert difference(expected, outputs(name, residual)) > 1e-2, "the weights are not residuals"
    adapted = peft.PeftModel.from_pretrained(residual, out, subfolder="pissa_init").eval()
    assert difference(expected, outputs(name, adapted)) <= ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_init(name: str, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What ``init`` writes, transformers and PEFT load to the original's outputs."""
    model, expected = source(name)
    architecture, out = ARCHITECTURES[name], tmp_path / "out"
    options: list[str] = []
    if architecture.targets:
        options += ["--target-modules", *architecture.targets]
    if architecture.exclude:
        options += ["--exclude-modules", *architecture.exclude]
    if options:
        # without them: a result all the same, or one line
        if main(["init", str(model), str(out), "--rank", str(RANK)]) == 0:
            check_loads(name, out, expected)
            out.rename(tmp_path / "first")
        else:
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("pissa-kernels: error: ")
            assert not list(tmp_path.iterdir())
    assert main(["init", str(model), str(out), "--rank", str(RANK), *options]) == 0, capsys.readouterr().err
    check_loads(name, out, expected)


@pytest.mark.parametrize("name", NAMES)
def test_demo(name: str, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo runs the model with inputs of its own, and what it saves, transformers and PEFT load."""
    model, expected = source(name)
    out = tmp_path / "out"
    arguments = ["demo", str(model), "--rank", str(RANK), "--no-compare", "--json", "--out", str(out)]
    assert main(arguments) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    assert record["holds"]
    assert record["not_called"] == [], "the inputs reach every layer"
    left_out = {".".join(layer.split(".")[-2:]) for layer in record["left_out"]}
    assert left_out == set(ARCHITECTURES[name].left_out)
    assert record["output_allowed"] < 1e-4
    check_loads(name, out, expected)


@pytest.mark.parametrize("command", ["init", "demo"])
def test_remote_code_is_not_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_with_remote_code(tmp_path / "own")
    before = witness(folder)
    assert main([command, str(folder), *([str(tmp_path / "out")] if command == "init" else [])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pissa-kernels: error: ")
    assert "code" in line
    assert str(folder) in line
    assert witness(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
