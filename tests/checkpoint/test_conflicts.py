"""Unfinished runs, sources that change, locks, and disks that fail: no result is mixed or half written."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pissa_kernels as pk

from ..support.checkpoints import witness
from ..support.refusing import LAYER, call_after, edit_tensor, init, refused, shard_of

# Changes during the run


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 5] = float("nan")
    return tensor


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def unfinished(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """OUT of a run that has failed after five tensors."""
    with pytest.MonkeyPatch.context() as patch:
        call_after(patch, 5, fail)
        refused(capsys, "Input/output error", model, tmp_path / "out", left=(".out.unfinished",))
    return tmp_path / "out"


def test_unfinished_run_is_not_mixed_with_another(
    model: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = (".out.unfinished",)
    words = "out has an unfinished run; --resume continues it, --force starts again"
    refused(capsys, words, model, unfinished, code=2, left=left)
    words = r"unfinished was started with options {\"rank\": 4}, not {\"rank\": 5}; --force starts again"
    refused(capsys, words, model, unfinished, "--resume", "--rank", 5, left=left)
    words = r"was started with options {\"seed\": 0, \"use_rslora\": false}, not {\"seed\": 1, \"use_rslora\": true}"
    refused(capsys, words, model, unfinished, "--resume", "--seed", 1, "--rslora", left=left)
    moved = Path(shutil.copytree(model, model.parent / "moved"))
    refused(capsys, r"was started with source \".*model\", not \".*moved\"", moved, unfinished, "--resume", left=left)
    assert init(model, unfinished, "--resume") == 0


def test_interrupted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    call_after(monkeypatch, 5, interrupt)
    refused(capsys, "interrupted; .*--resume", model, tmp_path / "out", left=(".out.unfinished",))
    monkeypatch.undo()
    assert init(model, tmp_path / "out", "--resume") == 0


@pytest.mark.parametrize("name", ["shard", "config.json", "new.txt"])
def test_source_changed_before_resuming(
    name: str, model: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shard_of(model, f"{LAYER}.weight") if name == "shard" else model / name
    changed.touch()
    words = rf"model has changed since the run in .*unfinished was started \({changed.name}\); --force starts again"
    refused(capsys, words, model, unfinished, "--resume", left=(".out.unfinished",))
    assert init(model, unfinished, "--force") == 0


@pytest.mark.parametrize("how", ["touched", "removed"])
def test_source_changed_during_the_run_is_not_published(
    how: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shard_of(model, f"{LAYER}.weight")
    call_after(monkeypatch, 5, changed.touch if how == "touched" else changed.unlink)
    assert init(model, tmp_path / "out") != 0
    lines = capsys.readouterr().err.splitlines()
    assert changed.name in lines[-1]
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert init(model, tmp_path / "out", "--resume") != 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parents", ["", "a/b"])
def test_nan_is_refused_and_leaves_nothing(
    parents: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / parents / "out"
    edit_tensor(model, f"{LAYER}.weight", spoil)
    words = rf"layer '{LAYER}', weight \(32, 32\): .*NaN.*; the unfinished result is deleted: repair the weight, or "
    words += "leave the layer out with --exclude-modules"
    refused(capsys, words, model, out)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.MonkeyPatch.context() as patch:
        call_after(patch, 2, fail)
        refused(capsys, "Input/output error", model, out, left=(".out.unfinished",))
    refused(capsys, words, model, out, "--resume")
    assert init(model, out, "--exclude-modules", "q_proj") == 0


def test_nan_keeps_the_result_that_was_to_be_replaced(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(model, tmp_path / "out") == 0
    before = witness(tmp_path / "out")
    edit_tensor(model, f"{LAYER}.weight", spoil)
    refused(capsys, "NaN", model, tmp_path / "out", "--force", left=("out",))
    assert witness(tmp_path / "out") == before


def refuse(record: dict[str, Any]) -> None:
    raise ValueError("of the caller")


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_other_failures_can_be_resumed(
    error: type[Exception], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise error("broken")

    call_after(monkeypatch, 5, broken)
    with pytest.raises(error, match="broken"):
        pk.init_checkpoint(model, tmp_path / "out", rank=4, progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="of the caller"):
        pk.init_checkpoint(model, tmp_path / "out", rank=4, progress=False, resume=True, on_tensor=refuse)
    assert pk.init_checkpoint(model, tmp_path / "out", rank=4, progress=False, resume=True).kept


def test_lock_of_another_process(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ".out.unfinished"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    refused(capsys, "another process is writing .*out", model, tmp_path / "out", left=(".out.unfinished",))
    refused(capsys, "another process is writing .*out", model, tmp_path / "out", "--force", left=(".out.unfinished",))
    os.close(descriptor)
    assert init(model, tmp_path / "out") == 0


# Disks that fail


@pytest.mark.parametrize("parents", ["", "a/b"])
def test_full_disk_fails_before_the_work(
    parents: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(capsys, r"no space for the \S+ GB of .*out \(No space left", model, tmp_path / parents / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_files_that_are_copied_need_space_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = sum(path.stat().st_size for path in (model / "code").iterdir())
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - space, space)  # after the tensors; the tokenizer is left
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(capsys, r"no space for the \S+ GB of .*out \(No space left", model, tmp_path / "out")


def test_disk_that_fails_during_the_run(
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


def test_parent_that_is_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    refused(capsys, "file", model, tmp_path / "file" / "out", code=2)
    refused(capsys, "file", model, tmp_path / "file" / "deeper" / "out", code=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_parent_without_write_permission(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(
        capsys,
        "out cannot be made: the folder .*locked cannot be written in; choose another",
        model,
        tmp_path / "locked" / "out",
    )
