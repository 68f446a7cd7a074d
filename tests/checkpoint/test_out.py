"""What is at OUT before a run, and what appears there during it: only --force replaces it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pissa_kernels as pk

from ..support.checkpoints import witness
from ..support.mounts import BindMounts
from ..support.refusing import call_after, init, refused

FIXTURE = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "residual"


def test_existing_result_needs_force(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert init(model, out) == 0
    words = "out exists and is not an empty folder; --force replaces it at the end, if init has made it"
    refused(capsys, words, model, out, code=2, left=("out",))
    refused(capsys, words, model, out, "--resume", "--seed", 1, code=2, left=("out",))
    before = (out / "pissa_manifest.json").read_bytes()
    assert init(model, out, "--force", "--seed", 1) == 0
    assert (out / "pissa_manifest.json").read_bytes() != before


# by name: what a user does to a result of init, and the name that the refusal gives
USED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a trained adapter": (lambda out: shutil.copytree(out / "pissa_init", out / "trained"), "trained"),
    "a file": (lambda out: (out / "report.html").write_text("<html>"), "report.html"),
    "a hidden file": (lambda out: (out / ".notes").touch(), ".notes"),
    "a model card": (lambda out: (out / "pissa_init" / "README.md").touch(), "pissa_init/README.md"),
    "an empty folder": (lambda out: (out / "runs").mkdir(), "runs"),
    "a link": (lambda out: (out / "kept").symlink_to("../source"), "kept"),
    "a dangling link": (lambda out: (out / "kept").symlink_to("nowhere"), "kept"),
    "a folder in the place of a file": (lambda out: [(out / "config.json").unlink(), (out / "config.json").mkdir()],
                                        "config.json"),
    "a link in the place of a folder": (lambda out: [(out / "pissa_init").rename(out.parent / "source" / "init"),
                                                     (out / "pissa_init").symlink_to("../source/init")], "pissa_init"),
    "a trained config": (lambda out: (out / "pissa_init" / "adapter_config.json").write_text("{}"),
                         "pissa_init/adapter_config.json, which has changed since init wrote it"),
    "trained factors": (lambda out: save_file({"a": torch.ones(2)}, out / "pissa_init" / "adapter_model.safetensors"),
                        "pissa_init/adapter_model.safetensors, which has changed since init wrote it"),
    "an older file in the place of weights": (lambda out: older(out / "pissa_init" / "adapter_model.safetensors"),
                                              "pissa_init/adapter_model.safetensors, which has changed since init"),
    "no manifest": (lambda out: (out / "pissa_manifest.json").unlink(),
                    r"code, and is not a result of init: it has no pissa_manifest\.json"),
    "a damaged manifest": (lambda out: (out / "pissa_manifest.json").write_text("{}"),
                           r"code, and is not a result of init: \S*out/pissa_manifest\.json is damaged: its format"),
    "a changed manifest": (lambda out: edit(out / "pissa_manifest.json", lambda text: text.replace("cpu", "tpu")),
                           r"code, and is not a result of init: \S* is damaged: its contents do not match its hash"),
}  # fmt: skip


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def older(path: Path) -> None:
    """Put trained factors in the place of a file, with the time of their original, as ``cp -p`` and ``rsync -a`` do."""
    save_file({"a": torch.ones(2)}, path)
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("case", USED)
def test_a_result_that_holds_more_is_kept(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use, words = USED[case]
    assert init(model, tmp_path / "out") == 0
    use(tmp_path / "out")
    before = witness(tmp_path)
    for options in ["--force"], ["--force", "--resume"]:
        refused(
            capsys, f"out holds {words}.*; move it away, or", model, tmp_path / "out", *options, code=2, left=("out",)
        )
        assert witness(tmp_path) == before


def test_a_folder_that_init_has_not_made_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    words = r"out holds mine, and is not a result of init: it has no pissa_manifest\.json; move it away"
    refused(capsys, words, model, tmp_path / "out", "--force", code=2, left=("out",))
    with pytest.raises(FileExistsError, match=words):
        pk.init_checkpoint(model, tmp_path / "out", rank=4, force=True, progress=False)
    refused(capsys, "mine exists and is not a folder", model, tmp_path / "out/mine", "--force", code=2, left=("mine",))
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_results_that_were_copied_or_written_by_an_earlier_version_are_replaced(model: Path, tmp_path: Path) -> None:
    for place, source in ("old", FIXTURE), ("copy", tmp_path / "old"):
        shutil.copytree(source, tmp_path / place, copy_function=shutil.copyfile)  # times of the copy
        for path in (tmp_path / place).rglob("*"):
            if path.name != "pissa_manifest.json":
                os.utime(path)  # after the manifest
        assert init(model, tmp_path / place, "--force") == 0
        assert (tmp_path / place / "tokenizer.json").exists()


def test_hard_links_of_a_replaced_result_are_kept(model: Path, tmp_path: Path) -> None:
    """Files of OUT that are files of MODEL, as after deduplication, and a copy of OUT with the same inodes."""
    out = tmp_path / "out"
    assert init(model, out) == 0
    (out / "tokenizer.json").unlink()
    os.link(model / "tokenizer.json", out / "tokenizer.json")
    shutil.copytree(out, tmp_path / "copy", copy_function=os.link)
    before = witness(tmp_path / "copy"), witness(model)
    assert init(model, out, "--force", "--seed", 1) == 0
    assert (witness(tmp_path / "copy"), witness(model)) == before


@pytest.mark.parametrize("target", ["nowhere", "source/model/config.json", "out"])
def test_links_to_no_folder_are_refused(
    target: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.symlink_to(target)
    words = "out exists and is not a folder"
    if "source" not in target:
        words = f"out is a symbolic link to {target}, which does not exist; make that folder, or choose another"
    for options in [], ["--force"], ["--resume"], ["--dry-run"]:
        refused(capsys, words, model, out, *options, code=2, left=("out",))
    assert os.readlink(out) == target


def test_places_that_cannot_be_made(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    words = "a/out cannot be made: .*link is a symbolic link that leads nowhere"
    refused(capsys, words, model, tmp_path / "link/a/out", code=2)
    with BindMounts() as mount:
        (tmp_path / "disk").mkdir()
        mount.add(tmp_path / "disk", tmp_path / "read-only", "ro")
        for out in "out", "new/out":
            words = "out cannot be made: the folder .*read-only cannot be written in; choose another"
            refused(capsys, words, model, tmp_path / "read-only" / out, code=1)
        refused(capsys, words.replace("out ", "read-only ", 1), model, tmp_path / "read-only", left=names_in(tmp_path))


def names_in(folder: Path) -> tuple[str, ...]:
    return tuple(path.name for path in folder.iterdir() if path.name != "source")


def test_dots_in_the_path(model: Path, tmp_path: Path) -> None:
    """Through a link, ".." is not the folder before it in the path."""
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/deep")
    assert init(model, tmp_path / "link" / ".." / "new" / ".." / "out") == 0
    assert sorted(names_in(tmp_path / "far")) == ["deep", "out"]


def base_of(out: Path) -> str:
    """The base model that the adapter names."""
    return str(json.loads((out / "pissa_init" / "adapter_config.json").read_text())["base_model_name_or_path"])


def fail() -> None:
    raise OSError(5, "Input/output error")


def test_link_to_a_folder_is_followed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    big, out = tmp_path / "big", tmp_path / "out"
    big.mkdir()
    out.symlink_to("big")
    assert init(model, out) == 0
    refused(
        capsys, "big exists and is not an empty folder; --force replaces it", model, out, code=2, left=("big", "out")
    )
    (big / "old").touch()
    refused(capsys, "big holds old, which init has not written", model, out, "--force", code=2, left=("big", "out"))
    (big / "old").unlink()
    call_after(monkeypatch, 5, fail)
    assert init(model, out, "--force") == 1
    monkeypatch.undo()
    assert init(model, out, "--resume") == 0
    assert out.is_symlink()
    assert (big / "config.json").is_file()
    assert base_of(big) == str(big)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "out", "source"]


def test_current_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert init(model, Path(".")) == 0
    assert (tmp_path / "here" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "source"]


def test_residual_checkpoint_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    residual = tmp_path / "source" / "residual"
    assert init(model, residual) == 0
    words = "is a residual already, as pissa_init/adapter_config.json says; take the checkpoint that it was made of"
    refused(capsys, words, residual, tmp_path / "out")
    for path in (residual / "pissa_init").iterdir():
        if path.suffix != ".safetensors":
            path.unlink()
    refused(capsys, "is a residual already, as pissa_init/adapter_model.safetensors", residual, tmp_path / "out")
    (residual / "pissa_init").rename(tmp_path / "source" / "adapter")
    refused(capsys, "is a residual already, as pissa_manifest.json says", residual, tmp_path / "out")


def test_empty_folder_is_filled(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert init(model, tmp_path / "out") == 0
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("before", ["missing", "empty", "result"])
@pytest.mark.parametrize("how", ["folder", "file", "link"])
def test_files_that_appear_at_out_during_the_run_are_kept(
    before: str, how: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, left = tmp_path / "out", ("kept", "out", ".out.unfinished")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").touch()

    def appear() -> None:
        if out.exists():
            shutil.rmtree(out)
        if how == "folder":
            shutil.copytree(tmp_path / "kept", out)
        else:
            out.touch() if how == "file" else out.symlink_to("kept")

    if before == "empty":
        out.mkdir()
    if before == "result":
        assert init(model, out) == 0
    with pytest.MonkeyPatch.context() as patch:
        call_after(patch, 5, appear)
        words = "out has come to exist during the run; move it away, then --resume finishes the run"
        if before == "result":
            words = {"folder": "out holds mine, and is not a result of init"}.get(how, "out is not a folder any more")
        refused(capsys, words, model, out, *(["--force"] if before == "result" else []), code=2, left=left)
    assert (out / "mine").exists() == (how != "file")
    for options in ["--resume"], ["--resume", "--force"]:
        before_resuming = witness(tmp_path)
        assert init(model, out, *options) == 2  # for a link, OUT is kept/ now
        assert witness(tmp_path) == before_resuming
    out.rename(tmp_path / "away")
    assert init(model, out, "--resume") == 0
    assert (out / "config.json").is_file()
    assert (tmp_path / "kept" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "kept", "out", "source"]


def test_what_is_saved_into_a_result_while_it_is_replaced_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert init(model, out) == 0
    with pytest.MonkeyPatch.context() as patch:
        call_after(patch, 5, (out / "trained.safetensors").touch)
        words = "out holds trained.safetensors, which init has not written and which would be lost; move it away"
        refused(capsys, words, model, out, "--force", "--seed", 1, code=2, left=("out", ".out.unfinished"))
    (out / "trained.safetensors").rename(tmp_path / "trained.safetensors")
    assert init(model, out, "--resume", "--seed", 1) == 0
    assert sorted(names_in(tmp_path)) == ["out", "trained.safetensors"]
