"""A command that must be refused, and checkpoints that are spoilt for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_kernels.cli import main as cli

from .checkpoints import witness

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.self_attn.q_proj"


def init(model: Path, out: Path, *arguments: object) -> int:
    return cli.main(["init", str(model), str(out), "--rank", "4", *map(str, arguments)])


def refused(
    capsys: pytest.CaptureFixture[str],
    words: str,
    model: Path,
    out: Path,
    *arguments: object,
    code: int = 1,
    left: tuple[str, ...] = (),
) -> None:
    """One line with these words; the source untouched; beside ``out`` no more than ``left``."""
    before = witness(model) if model.is_dir() else None
    capsys.readouterr()
    assert init(model, out, *arguments) == code
    told = capsys.readouterr()
    assert told.out == ""
    lines = [line for line in told.err.splitlines() if not line.startswith("left out, as they hold weights")]
    assert len(lines) == 1, told.err
    assert lines[0].startswith("pissa-kernels: error: ")
    assert re.search(words, lines[0]), lines[0]
    assert (witness(model) if model.is_dir() else None) == before
    there = [path.name for path in out.parent.iterdir()] if out.parent.is_dir() else []
    assert sorted(set(there) - {"source"}) == sorted(left)


def shard_of(model: Path, tensor: str) -> Path:
    return model / str(json.loads((model / INDEX).read_text())["weight_map"][tensor])


def edit_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = shard_of(model, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
