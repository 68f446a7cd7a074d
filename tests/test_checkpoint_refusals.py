"""What init refuses: in one clear line, with the source as it was, and nothing beside it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_kernels import cli
from pissa_kernels.checkpoint import init as init_module

from .checkpoints import save, small, tied_llama, witness
from .models import build

INDEX = "model.safetensors.index.json"
OTHER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil, in a folder of its own."""
    return Path(shutil.copytree(pristine, tmp_path / "source" / "model"))


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


def edit_index(model: Path, change: Callable[[dict[str, str]], object]) -> None:
    record = json.loads((model / INDEX).read_text())
    change(record["weight_map"])
    (model / INDEX).write_text(json.dumps(record))


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = shard_of(model, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(model: Path) -> None:
    path = shard_of(model, f"{OTHER}.weight")
    path.write_bytes(path.read_bytes()[:-100])


def garble(model: Path) -> None:
    path = shard_of(model, f"{OTHER}.weight")
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def duplicate(model: Path) -> None:
    first, last = sorted(model.glob("*.safetensors"))[:: len(list(model.glob("*.safetensors"))) - 1]
    save_file(load_file(last) | {next(iter(load_file(first))): torch.zeros(1)}, last, metadata={"format": "pt"})


def only_bin(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 5] = float("nan")
    return tensor


SPOILT: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "truncated": (truncate, 1, r"model-0000\d-of-0000\d\.safetensors is damaged or truncated"),
    "garbage": (garble, 1, r"model-0000\d-of-0000\d\.safetensors is damaged or truncated"),
    "missing": (lambda m: shard_of(m, f"{OTHER}.weight").unlink(), 2, r"lists model-0000\d-of.*, which is missing"),
    "index lacks one": (lambda m: edit_index(m, lambda i: i.pop(f"{OTHER}.weight")), 1, "weight' into no file"),
    "index has another": (lambda m: edit_index(m, lambda i: i.update(more=min(i.values()))), 1, "'more' .* is in none"),
    "index is wrong": (
        lambda m: edit_index(m, lambda i: i.update({f"{OTHER}.weight": max(i.values())})),
        1,
        rf"puts tensor '{OTHER}.weight' into model-\d+-of-\d+.safetensors, but it is in model-\d+-of",
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
    "int8": (lambda m: edit_tensor(m, f"{OTHER}.weight", lambda t: t.to(torch.int8)), 1, f"layer '{OTHER}' is I8 with"),
    "float64": (lambda m: edit_tensor(m, f"{OTHER}.weight", torch.Tensor.double), 1, f"layer '{OTHER}' is F64 with"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_source_that_is_not_whole(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiling, code, words = SPOILT[what]
    spoiling(model)
    refused(capsys, words, model, tmp_path / "out", code=code)


ARGUMENTS: dict[str, tuple[list[object], str]] = {
    "rank": (["--rank", 17], r"layer 'model\.layers\.0\.self_attn\.k_proj' has shape \(16, 32\).*1 ≤ r ≤ 16, got r=17"),
    "rank of one": (["--rank-pattern", "v_proj=20"], r"layer 'model\.layers\.0\.self_attn\.v_proj' has shape"),
    "alpha": (["--alpha", -1], f"layer '{OTHER}'.*scaling"),
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


# What is there already, and what happens meanwhile


def test_a_result_is_not_overwritten(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    words = "exists and is not an empty folder; --force replaces it at the end"
    for arguments in [], ["--resume"]:
        refused(capsys, words, model, out, *arguments, code=2, left=("out",))
    assert (out / "mine").read_text() == "kept"
    refused(capsys, words, model, out / "mine", code=2, left=("mine",))
    assert init(model, out, "--force") == 0
    assert not (out / "mine").exists()
    refused(capsys, words, model, out, "--resume", "--seed", 1, code=2, left=("out",))


def test_a_link_that_leads_nowhere(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.symlink_to("nowhere")
    refused(capsys, "exists and is not an empty folder; --force replaces it", model, out, code=2, left=("out",))
    assert init(model, out, "--force") == 0
    assert not out.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_residual_has_lost_its_principal_components(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(model, tmp_path / "source" / "residual") == 0
    words = "is a residual already, as pissa_init/adapter_config.json says; take the checkpoint that it was made of"
    refused(capsys, words, tmp_path / "source" / "residual", tmp_path / "out")


def test_an_empty_folder_is_filled(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert init(model, tmp_path / "out") == 0
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("out", ["", "out", "code/deep/out", "../model/out"])
def test_nothing_is_written_into_the_source(out: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = witness(model.parent)
    assert init(model, model / out) == 1
    assert re.fullmatch(r"pissa-kernels: error: OUT .* is in the source .*\n", capsys.readouterr().err)
    assert witness(model.parent) == before


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, then: Callable[[], object]) -> None:
    """Do something once so many tensors are done."""
    run = init_module.Worker.run
    done: list[object] = []

    def counted(self: Any, item: Any) -> Any:
        if len(done) == count:
            then()
        done.append(item)
        return run(self, item)

    monkeypatch.setattr(init_module.Worker, "run", counted)


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def unfinished(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Where a run has failed half-way."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5, fail)
        refused(capsys, "Input/output error", model, tmp_path / "out", left=(".out.unfinished",))
    return tmp_path / "out"


def test_an_unfinished_run_is_neither_forgotten_nor_mixed_with_another(
    model: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = (".out.unfinished",)
    words = "out has an unfinished run; --resume goes on with it, --force begins again"
    refused(capsys, words, model, unfinished, code=2, left=left)
    words = r"unfinished is of had another options: .*\"rank\": 4.*, now .*; --force begins again"
    refused(capsys, words, model, unfinished, "--resume", "--rank", 5, left=left)
    refused(capsys, "had another options", model, unfinished, "--resume", "--seed", 1, left=left)
    moved = Path(shutil.copytree(model, model.parent / "moved"))
    refused(capsys, "had another source: ", moved, unfinished, "--resume", left=left)
    assert init(model, unfinished, "--resume") == 0


def test_interrupted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    stop_after(monkeypatch, 5, interrupt)
    refused(capsys, "interrupted; .*--resume", model, tmp_path / "out", left=(".out.unfinished",))
    monkeypatch.undo()
    assert init(model, tmp_path / "out", "--resume") == 0


@pytest.mark.parametrize("name", ["shard", "config.json", "new.txt"])
def test_a_source_that_has_changed_since(
    name: str, model: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shard_of(model, f"{OTHER}.weight") if name == "shard" else model / name
    changed.touch()
    words = rf"model has changed since the run began that .*unfinished is of \({changed.name}\); --force begins again"
    refused(capsys, words, model, unfinished, "--resume", left=(".out.unfinished",))
    assert init(model, unfinished, "--force") == 0


@pytest.mark.parametrize("how", ["touched", "removed"])
def test_a_source_that_changes_meanwhile_is_not_published(
    how: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shard_of(model, f"{OTHER}.weight")
    stop_after(monkeypatch, 5, changed.touch if how == "touched" else changed.unlink)
    assert init(model, tmp_path / "out") != 0
    lines = capsys.readouterr().err.splitlines()
    assert changed.name in lines[-1]
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert init(model, tmp_path / "out", "--resume") != 0
    assert not (tmp_path / "out").exists()


def test_nan_is_named_and_what_was_mended_is_another_source(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = (".out.unfinished",)
    edit_tensor(model, f"{OTHER}.weight", spoil)
    refused(capsys, f"the weight of layer '{OTHER}'.*NaN", model, tmp_path / "out", left=left)
    refused(capsys, f"the weight of layer '{OTHER}'.*NaN", model, tmp_path / "out", "--resume", left=left)
    edit_tensor(model, f"{OTHER}.weight", torch.Tensor.nan_to_num)
    refused(capsys, "model has changed since", model, tmp_path / "out", "--resume", left=left)


def test_another_process_is_at_work(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ".out.unfinished"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    refused(capsys, "another process is writing .*out", model, tmp_path / "out", left=(".out.unfinished",))
    refused(capsys, "another process is writing .*out", model, tmp_path / "out", "--force", left=(".out.unfinished",))
    os.close(descriptor)
    assert init(model, tmp_path / "out") == 0


# The disk


@pytest.mark.parametrize("parents", ["", "a/b"])
def test_a_full_disk_is_met_before_the_work(
    parents: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(capsys, r"no space for the \S+ GB of .*out \(No space left", model, tmp_path / parents / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_fails_meanwhile(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = os.pwritev, []

    def full(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*arguments)

    monkeypatch.setattr(os, "pwritev", full)
    refused(capsys, "No space left on device", model, tmp_path / "out", left=(".out.unfinished",))
    monkeypatch.undo()
    assert init(model, tmp_path / "out", "--resume") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_parent_that_is_no_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    refused(capsys, "file", model, tmp_path / "file" / "out", code=2)
    refused(capsys, "file", model, tmp_path / "file" / "deeper" / "out", code=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_may_not_be_written_to(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(capsys, "Permission denied.*locked", model, tmp_path / "locked" / "out")
