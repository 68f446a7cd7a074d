"""What a merge writes, where it does not write, and how much memory it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pissa_kernels as pk
from pissa_kernels.files import header
from pissa_kernels.merge import write

from ..support.checkpoints import contents, tensors, witness
from ..support.merging import quantize
from ..support.models import build

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as base, and its residual, with other files."""
    folder = tmp_path_factory.mktemp("merge") / "folders"
    build("llama", torch.bfloat16, 64, 1).save_pretrained(folder / "base", max_shard_size="60KB")
    (folder / "base" / "tokenizer.json").write_text("{}\n")
    (folder / "base" / "code").mkdir()
    (folder / "base" / "code" / "modeling.py").write_text("raise RuntimeError('this must not run')\n")
    torch.save({"weight": torch.ones(3)}, folder / "base" / "pytorch_model.bin")
    pk.init_checkpoint(folder / "base", folder / "residual", rank=4, progress=False)
    return folder


def merge(folders: Path, merged: Path, **options: Any) -> Any:
    out = folders / "residual"
    return pk.merge_checkpoint(out, out / "pissa_init", merged, progress=False, **options)


def test_the_files_are_those_of_the_checkpoint(folders: Path, tmp_path: Path) -> None:
    merge(folders, tmp_path / "merged")
    found, base = contents(tmp_path / "merged"), contents(folders / "base")
    assert found.keys() == base.keys() - {"pytorch_model.bin"}
    assert {name for name in found if found[name] != base[name] and not name.endswith(".safetensors")} <= {
        "model.safetensors.index.json"
    }
    indexes = [json.loads((folders / name / "model.safetensors.index.json").read_text()) for name in ("base",)]
    indexes.append(json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text()))
    assert indexes[0] == indexes[1]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_files_give_the_same_bytes(workers: int, folders: Path, tmp_path: Path) -> None:
    before = witness(folders)
    for name, number in (("one", 1), ("other", workers)):
        merge(folders, tmp_path / name, workers=number, dtype="float16")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert witness(folders) == before


def test_a_quantized_checkpoint_becomes_a_plain_one(folders: Path, tmp_path: Path) -> None:
    """The config loses its quantization, the index lists what is there, and no scale is left."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    out = quantize(folders / "residual", tmp_path / "out", "nf4")
    assert len(list(out.glob("*.safetensors"))) > 3
    pk.merge_checkpoint(out, out / "pissa_init", tmp_path / "merged", progress=False)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config
    found = tensors(tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys() == tensors(folders / "base").keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    shards = set(index["weight_map"].values())
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        *shards, "config.json", "generation_config.json", "model.safetensors.index.json",
    }  # fmt: skip


def test_int8_gets_the_dtype_of_the_model(folders: Path, tmp_path: Path) -> None:
    """Its tensors name none: the config's, or that of the largest other tensor."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    out = quantize(folders / "residual", tmp_path / "out", "int8")
    config = json.loads((out / "config.json").read_text())
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), (None, torch.bfloat16)):
        (out / "config.json").write_text(json.dumps({**config, "dtype": name}))
        done = pk.merge_checkpoint(out, out / "pissa_init", tmp_path / str(name), progress=False)
        merged = tensors(tmp_path / str(name))
        assert {merged[layer.tensor].dtype for layer in done.layers} == {dtype}
        assert merged["lm_head.weight"].dtype == torch.bfloat16


def test_the_config_names_the_chosen_dtype(folders: Path, tmp_path: Path) -> None:
    merge(folders, tmp_path / "merged", dtype="float32")
    found, config = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "merged", folders / "base")
    )
    assert found == {**config, "dtype": "float32"}
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(tmp_path / "merged").values())


def test_a_failed_write_leaves_nothing(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def fail(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 9:
            raise OSError("No space left on device")
        header.write_at(*arguments)

    monkeypatch.setattr(write, "write_at", fail)
    with pytest.raises(OSError, match="No space"):
        merge(folders, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_changes_during_the_merge(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(*arguments: Any) -> None:
        os.utime(folders / "residual" / "config.json", ns=(1, len(os.listdir(tmp_path))))
        header.write_at(*arguments)

    monkeypatch.setattr(write, "write_at", touch)
    with pytest.raises(ValueError, match=r"residual has changed during the merge; merge again"):
        merge(folders, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_only_force_replaces_a_result_and_nothing_else(folders: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    merge(folders, merged)
    with pytest.raises(FileExistsError, match=r"merged exists and is not an empty folder; force replaces what merge"):
        merge(folders, merged)
    merge(folders, merged, force=True, dtype="float32")
    assert {value.dtype for value in tensors(merged).values()} == {torch.float32}
    (merged / "README.md").touch()
    with pytest.raises(FileExistsError, match=r"merged holds README\.md, which this merge has not written"):
        merge(folders, merged, force=True)
    (merged / "README.md").unlink()
    shard = sorted(merged.glob("*.safetensors"))[0]
    shard.write_bytes((folders / "base" / shard.name).read_bytes())
    with pytest.raises(FileExistsError, match=rf"{shard.name} is not as merge writes it and would be lost"):
        merge(folders, merged, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_result_lies_apart_from_what_is_read(folders: Path) -> None:
    before = witness(folders)
    for place in ("residual", "residual/merged", "residual/pissa_init"):
        with pytest.raises(FileExistsError, match="is read"):
            merge(folders, folders / place, force=True)
    assert witness(folders) == before


# Kills itself at the write of the tenth tensor.
KILLED = """
import os, signal, sys
from pissa_kernels.merge import run, write
merging, count = write.MergeFiles.write, 0

def fatal(*arguments):
    global count
    count += 1
    if count == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    merging(*arguments)

write.MergeFiles.write = fatal
run.merge_checkpoint(sys.argv[1], sys.argv[1] + "/pissa_init", sys.argv[2], progress=False)
"""


def test_a_killed_merge_leaves_nothing_in_its_place(folders: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, folders / "residual", tmp_path / "merged"], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert [path.name[:8] for path in tmp_path.iterdir()] == [".merged."]
    merge(folders, tmp_path / "merged")
    assert tensors(tmp_path / "merged").keys() == tensors(folders / "base").keys()


# Prints by how much a merge raises the peak of resident memory, in bytes.
MEASURED = """
import re, sys
from pathlib import Path
import pissa_kernels as pk

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

warm, out, merged = map(Path, sys.argv[1:])
pk.merge_checkpoint(warm, warm / "pissa_init", merged.with_name("warm"), workers=2, progress=False)
before = peak()
pk.merge_checkpoint(out, out / "pissa_init", merged, workers=2, progress=False)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_each_worker_holds_one_weight(folders: Path, tmp_path: Path) -> None:
    """Seven weights of 8 MiB, two workers. A run on a small checkpoint before loads the libraries."""
    config = build("llama").config
    config.update({"hidden_size": 2048, "intermediate_size": 2048, "num_key_value_heads": 4, "head_dim": 512})
    config.update({"num_hidden_layers": 1})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path / "base")
    pk.init_checkpoint(tmp_path / "base", tmp_path / "large", rank=2, init="pissa_niter_1", progress=False)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, folders / "residual", tmp_path / "large", tmp_path / "merged"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    largest = 2 * 2048 * 2048
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 7 * largest
    # beside the weights: blocks of a product in float32, where plain torch computes it
    assert int(done.stdout) <= 2 * largest + 20 * MIB
