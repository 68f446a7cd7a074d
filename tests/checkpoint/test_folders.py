"""Folders as people have them: what OUT takes from MODEL, what it leaves out, and what is no checkpoint."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

import pissa_kernels as pk

from ..support.checkpoints import contents
from ..support.models import output
from ..support.refusing import INDEX, LAYER, refused, shard_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
DENSE = "2_Dense/model.safetensors"


def init(model: Path, out: Path) -> pk.CheckpointReport:
    return pk.init_checkpoint(model, out, rank=4, progress=False)


def write(path: Path, data: Any = b"weights") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


# An adapter in MODEL


def test_the_config_of_an_adapter_without_weights_is_left_out(model: Path, tmp_path: Path) -> None:
    write(model / "adapter_config.json", {"peft_type": "LORA"})
    report = init(model, tmp_path / "out")
    assert report.left_out == ("pytorch_model.bin", "adapter_config.json")
    assert report.notes[1].startswith("left out, as its adapter has no weights there")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out", subfolder="pissa_init")
    (model / "adapter_config.json").unlink()
    expected = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert (output(adapted) - output(expected)).norm() < 0.05 * output(expected).norm()
    assert pk.verify_checkpoint(model, tmp_path / "out", progress=False) == []


def test_an_adapter_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers would load it on top of the model."""
    adapter = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapter.save_pretrained(model)
    words = r"model holds an adapter \(adapter_config\.json, adapter_model\.safetensors\), which .* merge it"
    refused(capsys, words, model, tmp_path / "out")


# Folders inside MODEL


def test_modules_of_sentence_transformers_are_copied(model: Path, tmp_path: Path) -> None:
    modules = [{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "Pooling"}]
    write(model / "modules.json", [*modules, {"idx": 2, "path": "2_Dense"}, {"idx": 3, "path": "3_Old"}, {"path": 4}])
    write(model / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    (model / "2_Dense").mkdir()
    save_file({"linear.weight": torch.randn(8, 32)}, model / DENSE, metadata={"format": "pt"})
    write(model / "3_Old" / "pytorch_model.bin")
    others = [
        "onnx/model.onnx",
        "openvino/openvino_model.bin",
        "original/consolidated.00.pth",
        "run-5/model.safetensors",
    ]
    for name in others:
        write(model / name)
    report = init(model, tmp_path / "out")
    assert sorted(report.left_out) == sorted([*others, "pytorch_model.bin"])
    before, after = contents(model), contents(tmp_path / "out")
    for name in (DENSE, "3_Old/pytorch_model.bin", "1_Pooling/config.json", "modules.json"):
        assert after[name] == before[name] is not None
    assert not after.keys() & {*others, "onnx"}
    assert pk.verify_checkpoint(model, tmp_path / "out", progress=False) == []
    (tmp_path / "out" / DENSE).write_bytes(b"other")
    assert [finding.where for finding in pk.verify_checkpoint(model, tmp_path / "out", progress=False)] == [DENSE]


def test_all_other_files_are_copied_as_they_are(model: Path, tmp_path: Path) -> None:
    names = ["generation_config.json", "chat_template.jinja", "preprocessor_config.json", "tokenizer_config.json"]
    for name in [*names, "additional_chat_templates/tool.jinja", "merges.txt", "spiece.model", "figure.png"]:
        write(model / name, {"auto_map": {"AutoTokenizer": ["code.Own", None], "AutoProcessor": 3}, "list": [[], {}]})
    write(model / "picture.png", POINTER)  # no model needs it
    init(model, tmp_path / "out")
    before, after = contents(model), contents(tmp_path / "out")
    assert [name for name in before if name not in after] == ["pytorch_model.bin"]
    for name in before:
        if not name.startswith(("model-", "pytorch_model")):
            assert after[name] == before[name]


def test_indexes_of_left_out_weights_are_left_out(model: Path, tmp_path: Path) -> None:
    names = ["pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "tf_model.h5.index.json"]
    for name in [*names, "model.fp16.safetensors"]:
        write(model / name, {"weight_map": {}})
    report = init(model, tmp_path / "out")
    assert sorted(report.left_out) == sorted([*names, "model.fp16.safetensors", "pytorch_model.bin"])
    assert (tmp_path / "out" / INDEX).is_file()


# Things that are no files


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # its path may be too long
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def make_cycles(model: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (model / name).mkdir()
        for other in ("a", "b", "c", "d"):
            (model / name / f"to_{other}").symlink_to(model / other)
    (model / "self").symlink_to(model)


ODD = os.fsdecode(b"odd \xff\n name.txt")
LEFT_OUT: dict[str, Callable[[Path], Any]] = {
    "pipe.json": lambda m: os.mkfifo(m / "pipe.json"),
    "pipe.bin": lambda m: os.mkfifo(m / "pipe.bin"),
    "folder/socket": lambda m: ((m / "folder").mkdir(), make_socket(m / "folder" / "socket")),
    "link.json": lambda m: (m / "link.json").symlink_to("/dev/zero"),
    "missing.bin": lambda m: (m / "missing.bin").symlink_to("nowhere"),
    "code/back": lambda m: (m / "code" / "back").symlink_to(m),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_no_file_is_left_out(name: str, model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").unlink()
    LEFT_OUT[name](model)
    report = init(model, tmp_path / "out")
    assert report.left_out == (name,)
    assert report.notes[0].endswith(f": {name}")
    assert not os.path.lexists(tmp_path / "out" / name)


def test_links_in_circles_end(model: Path, tmp_path: Path) -> None:
    make_cycles(model)
    report = init(model, tmp_path / "out")
    assert "self" in report.left_out
    assert "a/to_b/to_c/to_d/to_a" in report.left_out


@pytest.mark.slow
def test_names_in_odd_bytes(model: Path, tmp_path: Path) -> None:
    (model / ODD).write_text("content")
    (model / ODD.replace("txt", "bin")).write_text("weights")
    command = [sys.executable, "-m", "pissa_kernels", "init", str(model), str(tmp_path / "out"), "--rank", "4"]
    done = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, timeout=100, check=True)
    assert len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["left_out"][0] == ODD.replace("txt", "bin")
    init(model, tmp_path / "out")
    assert (tmp_path / "out" / ODD).read_text() == "content"
    assert pk.verify_checkpoint(model, tmp_path / "out", progress=False) == []


def replace(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda model: (model / name).write_bytes(data)


def as_link(name: str, target: str = "../../blobs/4d7a") -> Callable[[Path], Any]:
    return lambda model: ((model / name).unlink(missing_ok=True), (model / name).symlink_to(target))


def as_pipe(name: str) -> Callable[[Path], Any]:
    return lambda model: ((model / name).unlink(), os.mkfifo(model / name))


def shard(data: bytes) -> Callable[[Path], Any]:
    return lambda model: shard_of(model, f"{LAYER}.weight").write_bytes(data)


def cut(model: Path) -> None:
    path = shard_of(model, f"{LAYER}.weight")
    path.write_bytes(path.read_bytes()[:-100])


def lose_shards(model: Path) -> None:
    for path in sorted(model.glob("model-*.safetensors"))[1:]:
        path.unlink()


SHARD = r"model-0000\d-of-0000\d\.safetensors is "
# by name: what is done to a checkpoint, exit status, words of the message
SPOILT: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "LFS weights": (
        shard(POINTER),
        1,
        SHARD + "a Git LFS pointer and not the file itself; run git lfs pull in its folder",
    ),
    "a page for weights": (shard(b"\n<!DOCTYPE html><html>404"), 1, SHARD + "an HTML page, .* download it again"),
    "empty weights": (shard(b""), 1, SHARD + "empty; download it again"),
    "an answer for weights": (
        shard(b'{"error": "Access denied"}'),
        1,
        SHARD + r"text \(.*Access denied.*and not safetensors",
    ),
    "zeros": (shard(bytes(4096)), 1, SHARD + "zeros at its start, as in a download that did not complete"),
    "a pickle": (
        shard(b"PK\x03\x04" + bytes(100)),
        1,
        SHARD + "a file of torch.save; load it with torch.load and save",
    ),
    "cut short": (
        cut,
        1,
        SHARD + r"damaged or truncated: its tensors end at byte \d+ and it has \d+; download it again",
    ),
    "LFS config": (
        replace("config.json", POINTER),
        1,
        "config.json is a Git LFS pointer and not the file itself; run git",
    ),
    "weights of another name": (
        lambda m: write(m / "config.json", {"model_type": "llama", "transformers_weights": "other.safetensors"}),
        1,
        r"config.json names 'other.safetensors' for the weights \(transformers_weights\); rename that file model.safet",
    ),
    "empty config": (replace("config.json", b""), 1, "config.json is empty; download it again"),
    "LFS tokenizer": (replace("tokenizer.json", POINTER), 1, "tokenizer.json is a Git LFS pointer"),
    "LFS vocabulary": (replace("spiece.model", POINTER), 1, "spiece.model is a Git LFS pointer"),
    "LFS index": (replace(INDEX, POINTER), 1, f"{INDEX} is a Git LFS pointer"),
    "config is a pipe": (as_pipe("config.json"), 1, "config.json is a pipe; accepted is a file"),
    "index is a pipe": (as_pipe(INDEX), 1, f"{INDEX} is a pipe; accepted is a file"),
    "weights are a pipe": (
        lambda m: os.mkfifo(m / "model.safetensors"),
        1,
        "model.safetensors is a pipe; accepted is a file",
    ),
    "weights are a device": (
        as_link("model.safetensors", "/dev/zero"),
        1,
        "model.safetensors is a device; accepted is",
    ),
    "weights are a folder": (lambda m: (m / "model.safetensors").mkdir(), 1, "model.safetensors is a folder"),
    "broken link to weights": (as_link("model.safetensors"), 1, "is a link to ../../blobs/4d7a, which does not exist"),
    "broken link to config": (
        as_link("config.json"),
        1,
        "config.json is a link to ../../blobs/4d7a, which does not ex",
    ),
    "broken link to a tokenizer": (
        as_link("tokenizer.json"),
        2,
        "tokenizer.json is a link to .*; complete the download",
    ),
    "an index without metadata": (
        lambda m: write(m / INDEX, {"weight_map": json.loads((m / INDEX).read_text())["weight_map"]}),
        1,
        f"{INDEX} is not an index of shards: KeyError 'metadata'",
    ),
    "shards missing": (
        lose_shards,
        2,
        r"lists model-00002-of.*, which is missing, as are (\d) of (\d) shards; complete",
    ),
    "a module outside": (
        lambda m: write(m / "modules.json", [{"path": "../other"}]),
        1,
        r"modules.json lists '\.\./other', which is outs",
    ),
    "a module's LFS weights": (
        lambda m: (write(m / "modules.json", [{"path": "2_Dense"}]), write(m / DENSE, POINTER)),
        1,
        f"{DENSE} is a Git LFS",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_files(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, code, words = SPOILT[what]
    spoil(model)
    out = tmp_path / "out"
    found = [path for path in model.rglob("*") if not path.is_file() and not path.is_dir()]
    if found:  # the contents of pipes and devices cannot be compared
        with pytest.raises((OSError, ValueError), match=words):
            init(model, out)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        return
    refused(capsys, words, model, out, code=code)


# What is no checkpoint. By name: files (None: the config of a Llama), words of the message

ADVICE: dict[str, tuple[dict[str, Any], str]] = {
    "shards of PyTorch": (
        {"config.json": {}, "pytorch_model-00001-of-00002.bin": b"", "pytorch_model.bin.index.json": {}},
        "only pytorch_model-00001-of-00002.bin: load the model with transformers and save it as safetensors",
    ),
    "PyTorch first": ({"config.json": {}, "model.gguf": b"", "pytorch_model.bin": b""}, "only pytorch_model.bin: load"),
    "a variant": (
        {"config.json": {}, "model.fp16.safetensors": b""},
        r"only model.fp16.safetensors: load the model with from_pretrained\(…, variant='fp16'\) and save it",
    ),
    "a variant in shards": (
        {"config.json": {}, "model.bf16-00001-of-00002.safetensors": b"", "model.safetensors.index.bf16.json": {}},
        "variant='bf16'",
    ),
    "no index": (
        {"config.json": {}, "model-00001-of-00002.safetensors": b""},
        "a shard without model.safetensors.index",
    ),
    "another name": (
        {"config.json": {}, "llama.safetensors": b""},
        "transformers looks for model.safetensors; rename the",
    ),
    "GGUF": (
        {"llama-q4.gguf": b"GGUF"},
        r"no config.json, only llama-q4.gguf: .*gguf_file='llama-q4.gguf'\) and the pac",
    ),
    "ONNX": ({"config.json": {}, "model.onnx": b""}, "only model.onnx, which transformers does not load: download"),
    "Meta's": (
        {"params.json": {}, "consolidated.00.pth": b""},
        "only consolidated.00.pth: in a format that transformers",
    ),
    "Flax": (
        {"config.json": {}, "flax_model.msgpack": b""},
        "only flax_model.msgpack: of TensorFlow or Flax, which trans",
    ),
    "Keras": (
        {"config.json": {}, "tf_model.h5": b""},
        "only tf_model.h5: of TensorFlow or Flax, which transformers 5 does",
    ),
    "MLX": ({"config.json": {}, "weights.npz": b""}, "only weights.npz, which transformers does not load"),
    "only a config": ({"config.json": {}}, "has neither .*; download the model's weights too"),
    "an adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "someone/model"}, "adapter_model.safetensors": b""},
        "no config.json, only an adapter; give the folder of the model that it was trained on, someone/model",
    ),
    "a pipeline of diffusers": (
        {
            "model_index.json": {},
            "unet/config.json": {"_class_name": "UNet2DConditionModel"},
            "text_encoder/config.json": {"architectures": ["CLIPTextModel"]},
            "text_encoder_2/config.json": {"architectures": ["T5EncoderModel"]},
        },
        "a pipeline of diffusers .*; give the folder of its model, .*model/text_encoder, or text_encoder_2 beside it",
    ),
    "a model of diffusers": (
        {"config.json": {"_class_name": "UNet2DConditionModel"}, "diffusion_pytorch_model.safetensors": b""},
        "holds a UNet2DConditionModel of diffusers, which transformers does not load",
    ),
    "a transformer in a folder": (
        {
            "modules.json": [{"path": "0_Transformer"}, {"path": "1_Pooling"}],
            "0_Transformer/config.json": {},
            "0_Transformer/model.safetensors": b"",
            "1_Pooling/config.json": {},
        },
        "modules.json puts the transformer in a folder of its own: give .*model/0_Transformer",
    ),
    "a folder of runs": (
        {"checkpoint-9/config.json": {}, "log.txt": b""},
        "it has no config.json; give the folder of its model, .*/ch",
    ),
    "nothing": ({"notes.txt": b""}, "is not a model folder: it has no config.json$"),
    "odd JSON": ({"modules.json": 3, "adapter_config.json": [], "model_index.json": b"{"}, "a pipeline of diffusers"),
}


@pytest.mark.parametrize("what", ADVICE)
def test_what_is_no_checkpoint(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, words = ADVICE[what]
    model = tmp_path / "source" / "model"
    for name, data in files.items():
        write(model / name, data)
    refused(capsys, words, model, tmp_path / "out", code=2)


def test_a_model_in_the_cache_of_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "source" / "models--someone--model"
    write(folder / "snapshots" / "4d7a" / "config.json", {})
    refused(capsys, "is a model in the hub's cache: give .*/snapshots/4d7a", folder, tmp_path / "out", code=2)


def test_the_number_of_missing_shards(model: Path, tmp_path: Path) -> None:
    count = len(list(model.glob("model-*.safetensors")))
    lose_shards(model)
    with pytest.raises(FileNotFoundError, match=re.escape(f"as are {count - 1} of {count} shards")):
        init(model, tmp_path / "out")
