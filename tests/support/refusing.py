"""Runs of init that must be refused, and changes to checkpoints."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_kernels.checkpoint.worker import Worker
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
    """Check that init prints one line on stderr and writes nothing.

    Args:
        capsys: pytest's fixture.
        words: regular expression for a part of the line.
        model, out, arguments: of the command.
        code: exit status.
        left: names beside ``out`` after the run, without "source".
    """
    before = witness(model) if model.is_dir() else None
    capsys.readouterr()
    assert init(model, out, *arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("left out, as they hold weights")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("pissa-kernels: error: ")
    assert re.search(words, lines[0]), lines[0]
    assert (witness(model) if model.is_dir() else None) == before
    names = {path.name for path in out.parent.iterdir()} if out.parent.is_dir() else set()
    assert sorted(names - {"source"}) == sorted(left)


def call_after(monkeypatch: pytest.MonkeyPatch, count: int, then: Callable[[], object]) -> None:
    """Call a function after this number of tensors: once, or before each further tensor as long as it raises."""
    run, lock = Worker.run, threading.Lock()
    begun: list[object] = []

    def counted(self: Any, tensor: Any) -> Any:
        with lock:
            if len(begun) == count:
                then()
            begun.append(tensor)
        return run(self, tensor)

    monkeypatch.setattr(Worker, "run", counted)


def shard_of(model: Path, tensor: str) -> Path:
    return model / str(json.loads((model / INDEX).read_text())["weight_map"][tensor])


def edit_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = shard_of(model, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
