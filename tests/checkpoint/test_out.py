"""What is at OUT before a run, and what appears there during it: only --force replaces it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ..support.refusing import call_after, init, refused


def test_existing_result_needs_force(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_dangling_link(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.symlink_to("nowhere")
    refused(capsys, "exists and is not an empty folder; --force replaces it", model, out, code=2, left=("out",))
    assert init(model, out, "--force") == 0
    assert not out.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert base_of(out) == str(out)
    assert init(model, out, "--resume") == 0, "the result is that of this run"


def base_of(out: Path) -> str:
    """The base model that the adapter names."""
    return str(json.loads((out / "pissa_init" / "adapter_config.json").read_text())["base_model_name_or_path"])


def test_link_to_a_folder_is_followed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    big, out = tmp_path / "big", tmp_path / "out"
    big.mkdir()
    out.symlink_to("big")
    assert init(model, out) == 0
    refused(
        capsys, "big exists and is not an empty folder; --force replaces it", model, out, code=2, left=("big", "out")
    )
    (big / "old").touch()
    assert init(model, out, "--force") == 0
    assert out.is_symlink()
    assert (big / "config.json").is_file()
    assert not (big / "old").exists()
    assert base_of(big) == str(big)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "out", "source"]


def test_replaced_folders_may_hold_links(model: Path, tmp_path: Path) -> None:
    """The links are deleted, not what they lead to; so is a link that has taken the place of OUT."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    kept.mkdir()
    (kept / "mine").touch()
    out.mkdir()
    (out / "link").symlink_to(kept)
    assert init(model, out, "--force") == 0
    with pytest.MonkeyPatch.context() as patch:
        call_after(patch, 5, lambda: (out.rename(tmp_path / "first"), out.symlink_to(kept)))
        assert init(model, out, "--force") == 0
    assert not out.is_symlink()
    assert (kept / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "kept", "out", "source"]


def test_current_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert init(model, Path(".")) == 0
    assert (tmp_path / "here" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "source"]


def test_mount_point_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    words = "out is a mount point, which a finished result cannot replace; choose a folder in it"
    refused(capsys, words, model, out, code=2, left=("out",))
    refused(capsys, words, model, out, "--force", code=2, left=("out",))
    assert init(model, out / "in") == 0


def test_residual_checkpoint_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    residual = tmp_path / "source" / "residual"
    assert init(model, residual) == 0
    words = "is a residual already, as pissa_init/adapter_config.json says; take the checkpoint that it was made of"
    refused(capsys, words, residual, tmp_path / "out")
    for path in (residual / "pissa_init").iterdir():
        if path.suffix != ".safetensors":
            path.unlink()
    refused(capsys, "is a residual already, as pissa_init/adapter_model.safetensors", residual, tmp_path / "out")


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

    if before != "missing":
        out.mkdir()
    if before == "result":
        (out / "old").touch()
    options = ["--force"] if before == "result" else []
    with pytest.MonkeyPatch.context() as patch:
        call_after(patch, 5, appear)
        if before == "result":  # replaced, as --force says
            assert init(model, out, *options) == 0
        else:
            words = "out has come to exist during the run; --resume --force replaces it"
            refused(capsys, words, model, out, code=2, left=left)
            assert (out / "mine").exists() == (how != "file")
            words = "out exists and is not an empty folder; --resume --force replaces it"
            if how == "link":  # OUT is kept/ now, which no run has begun
                words = "kept exists and is not an empty folder; --force replaces it"
            refused(capsys, words, model, out, "--resume", code=2, left=left)
            if how == "link":
                out.unlink()
            assert init(model, out, "--resume", "--force") == 0
    assert (out / "config.json").is_file()
    assert not out.is_symlink()
    assert (tmp_path / "kept" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out", "source"]
