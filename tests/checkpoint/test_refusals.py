"""What init refuses: in one clear line, with the source as it was, and nothing beside it."""

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


SPOILT: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "truncated": (truncate, 1, r"model-0000\d-of-0000\d\.safetensors is damaged or truncated"),
    "garbage": (garble, 1, r"model-0000\d-of-0000\d\.safetensors is damaged or truncated"),
    "missing": (lambda m: shard_of(m, f"{LAYER}.weight").unlink(), 2, r"lists model-0000\d-of.*, which is missing"),
    "index lacks one": (lambda m: edit_index(m, lambda i: i.pop(f"{LAYER}.weight")), 1, "weight' into no file"),
    "index has another": (lambda m: edit_index(m, lambda i: i.update(more=min(i.values()))), 1, "'more' .* is in none"),
    "index is wrong": (
        lambda m: edit_index(m, lambda i: i.update({f"{LAYER}.weight": max(i.values())})),
        1,
        rf"puts tensor '{LAYER}.weight' into model-\d+-of-\d+.safetensors, but it is in model-\d+-of",
    ),
    "index leads out": (lambda m: edit_index(m, lambda i: i.update(more="../x.safetensors")), 1, "no safetensors file"),
    "index is no JSON": (lambda m: (m / INDEX).write_text("{"), 1, f"{INDEX} is no index of shards"),
    "twice": (duplicate, 1, r"tensor '.*' is in model-00001-of.* and in model"),
    "no config": (lambda m: (m / "config.json").unlink(), 2, "is not a model folder: it has no config.json"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), 1, "config.json is no model's config: Exp"),
    "config is a list": (lambda m: (m / "config.json").write_text("[1]"), 1, "config.json is no model's config"),
    "only bin": (only_bin, 2, "has neither model.safetensors nor .*, only pytorch_model.bin; load and save it"),
    "no folder": (shutil.rmtree, 2, "model does not exist"),
    "quantised": (lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}), 1, r"is quantised \(gptq\)"),
    "unknown class": (lambda m: edit_config(m, architectures=["NoSuchModel"]), 1, "names the class NoSuchModel"),
    "another shape": (lambda m: edit_config(m, intermediate_size=64), 1, r"'model\.layers\.0\.mlp.* but the model"),
    "int8": (lambda m: edit_tensor(m, f"{LAYER}.weight", lambda t: t.to(torch.int8)), 1, f"layer '{LAYER}' is I8 with"),
    "float64": (lambda m: edit_tensor(m, f"{LAYER}.weight", torch.Tensor.double), 1, f"layer '{LAYER}' is F64 with"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_source_that_is_not_whole(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiling, code, words = SPOILT[what]
    spoiling(model)
    refused(capsys, words, model, tmp_path / "out", code=code)


ARGUMENTS: dict[str, tuple[list[object], str]] = {
    "rank": (["--rank", 17], r"layer 'model\.layers\.0\.self_attn\.k_proj' has shape \(16, 32\).*1 ≤ r ≤ 16, got r=17"),
    "rank of one": (["--rank-pattern", "v_proj=20"], r"layer 'model\.layers\.0\.self_attn\.v_proj' has shape"),
    "alpha": (["--alpha", -1], f"layer '{LAYER}'.*scaling"),
    "nothing": (["--target-modules", "nope"], "nope"),
    "all excluded": (["--exclude-modules", ".*"], "xclude"),
    "embedding": (["--target-modules", "embed_tokens"], "'model.embed_tokens' is a Embedding"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_an_adapter_that_cannot_be(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = ARGUMENTS[what]
    refused(capsys, words, model, tmp_path / "out", *arguments)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_head_is_no_target(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tied_llama() if name == "llama" else build(name), tmp_path / "source" / "model")
    words = "layer 'lm_head'.* is tied to .*(embed_tokens|wte).*save the model untied"
    refused(capsys, words, model, tmp_path / "out", "--target-modules", "lm_head")
