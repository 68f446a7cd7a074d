"""What init finds at OUT, what changes while it runs, and disks that fail: nothing is lost, mixed or overwritten."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa_kernels.checkpoint import run as init_module

from ..support.checkpoints import witness
from ..support.refusing import LAYER, edit_tensor, init, refused, shard_of

# What is there already


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


# What happens meanwhile


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 5] = float("nan")
    return tensor


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
    changed = shard_of(model, f"{LAYER}.weight") if name == "shard" else model / name
    changed.touch()
    words = rf"model has changed since the run began that .*unfinished is of \({changed.name}\); --force begins again"
    refused(capsys, words, model, unfinished, "--resume", left=(".out.unfinished",))
    assert init(model, unfinished, "--force") == 0


@pytest.mark.parametrize("how", ["touched", "removed"])
def test_a_source_that_changes_meanwhile_is_not_published(
    how: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shard_of(model, f"{LAYER}.weight")
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
    edit_tensor(model, f"{LAYER}.weight", spoil)
    refused(capsys, f"the weight of layer '{LAYER}'.*NaN", model, tmp_path / "out", left=left)
    refused(capsys, f"the weight of layer '{LAYER}'.*NaN", model, tmp_path / "out", "--resume", left=left)
    edit_tensor(model, f"{LAYER}.weight", torch.Tensor.nan_to_num)
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
