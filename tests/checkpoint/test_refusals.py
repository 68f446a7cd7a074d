"""Checkpoints and options that init refuses: with one line on stderr, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..support.checkpoints import save, tied_llama
from ..support.models import build
from ..support.refusing import INDEX, LAYER, edit_tensor, refused, shard_of


def edit_index(model: Path, change: Callable[[dict[str, str]], object]) -> None:
    record = json.loads((model / INDEX).read_text())
    change(record["weight_map"])
    (model / INDEX).write_text(json.dumps(record))


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(model: Path) -> None:
    path = shard_of(model, f"{LAYER}.weight")
    path.write_bytes(path.read_bytes()[:-100])


def garble(model: Path) -> None:
    path = shard_of(model, f"{LAYER}.weight")
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def duplicate(model: Path) -> None:
    first, last = sorted(model.glob("*.safetensors"))[:: len(list(model.glob("*.safetensors"))) - 1]
    save_file(load_file(last) | {next(iter(load_file(first))): torch.zeros(1)}, last, metadata={"format": "pt"})


def only_bin(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


# by name: what is done to a checkpoint, exit status, words of the message
SPOILT: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "truncated": (truncate, 1, r"model-0000\d-of-0000\d\.safetensors is damaged or truncated"),
    "garbage": (garble, 1, r"model-0000\d-of-0000\d\.safetensors is damaged or truncated"),
    "missing": (lambda m: shard_of(m, f"{LAYER}.weight").unlink(), 2, r"lists model-0000\d-of.*, which is missing"),
    "index lacks a tensor": (
        lambda m: edit_index(m, lambda i: i.pop(f"{LAYER}.weight")),
        1,
        rf"does not list tensor '{LAYER}.weight', which is in model-\d+-of-\d+.safetensors",
    ),
    "index has another tensor": (
        lambda m: edit_index(m, lambda i: i.update(more=min(i.values()))),
        1,
        r"lists tensor 'more' in model-00001-of-\d+.safetensors, which does not hold it",
    ),
    "index has another shard": (
        lambda m: edit_index(m, lambda i: i.update({f"{LAYER}.weight": max(i.values())})),
        1,
        rf"lists tensor '{LAYER}.weight' in model-\d+-of-\d+.safetensors, but it is in model-\d+-of",
    ),
    "index leads out": (
        lambda m: edit_index(m, lambda i: i.update(more="../x.safetensors")),
        1,
        r"lists '\.\./x\.safetensors', which is not a safetensors file in its folder",
    ),
    "index is not JSON": (lambda m: (m / INDEX).write_text("{"), 1, f"{INDEX} is not an index of shards"),
    "twice": (duplicate, 1, r"tensor '.*' is in model-00001-of.* and in model"),
    "no config": (lambda m: (m / "config.json").unlink(), 2, "is not a model folder: it has no config.json"),
    "config is not JSON": (
        lambda m: (m / "config.json").write_text("{"),
        1,
        "config.json is not the config of a model: Exp",
    ),
    "config is a list": (lambda m: (m / "config.json").write_text("[1]"), 1, "config.json is not the config of a"),
    "only bin": (
        only_bin,
        2,
        r"has neither model.safetensors nor .*, only pytorch_model.bin: load the model with transformers and save it",
    ),
    "no folder": (shutil.rmtree, 2, "model does not exist"),
    "a file": (lambda m: (shutil.rmtree(m), m.write_text("")), 2, "model is not a folder; give the folder that holds"),
    "quantized": (lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}), 1, r"is quantized \(gptq\)"),
    "unknown class": (lambda m: edit_config(m, architectures=["NoSuchModel"]), 1, "names the class NoSuchModel"),
    "unknown model type": (lambda m: edit_config(m, model_type="no_such_type"), 1, "model type `no_such_type`"),
    "another shape": (
        lambda m: edit_config(m, intermediate_size=64),
        1,
        r"layer 'model\.layers\.0\.mlp\.\w+', weight \(.*\): the model of config.json has a weight of shape \(.*64.*\)",
    ),
    "int8": (
        lambda m: edit_tensor(m, f"{LAYER}.weight", lambda t: t.to(torch.int8)),
        1,
        rf"layer '{LAYER}', weight \(32, 32\): the weight is I8; PiSSA takes F32, F16 and BF16",
    ),
    "float64": (
        lambda m: edit_tensor(m, f"{LAYER}.weight", torch.Tensor.double),
        1,
        rf"layer '{LAYER}', weight \(32, 32\): the weight is F64; PiSSA takes F32, F16 and BF16",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_checkpoint(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, code, words = SPOILT[what]
    spoil(model)
    refused(capsys, words, model, tmp_path / "out", code=code)


# by name: options, words of the message
ARGUMENTS: dict[str, tuple[list[object], str]] = {
    "rank too high": (
        ["--rank", 33],
        r"layer 'model\.layers\.0\.self_attn\.q_proj', weight \(32, 32\): .*1 ≤ r ≤ 32, got r=33",
    ),
    "rank of one layer too high": (
        ["--rank-pattern", "v_proj=20"],
        r"layer 'model\.layers\.0\.self_attn\.v_proj', weight \(16, 32\): .*got r=20",
    ),
    "negative alpha": (["--alpha", -1], r"alpha must be a finite number above 0, got -1\.0"),
    "nothing to adapt": (["--target-modules", "nope"], "nope.*not found"),
    "all excluded": (["--exclude-modules", ".*"], "xclude"),
    "embedding": (["--target-modules", "embed_tokens"], "'model.embed_tokens' is a Embedding"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_refused_options(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = ARGUMENTS[what]
    refused(capsys, words, model, tmp_path / "out", *arguments)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_head_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tied_llama() if name == "llama" else build(name), tmp_path / "source" / "model")
    words = "layer 'lm_head'.* is tied to .*(embed_tokens|wte).*save the model untied"
    refused(capsys, words, model, tmp_path / "out", "--target-modules", "lm_head")
