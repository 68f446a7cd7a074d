"""The folder that a path leads to, and folders that hold more than what a run wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pissa_kernels.files.atomic import atomic_folder
from pissa_kernels.files.destination import check_deletable, destination

from ..support.mounts import BindMounts


def test_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/deep")
    assert destination(tmp_path / "link") == tmp_path / "far" / "deep"
    assert destination(tmp_path / "link" / ".." / "new") == tmp_path / "far" / "new"
    assert destination(tmp_path / "new" / "newer") == tmp_path / "new" / "newer"
    monkeypatch.chdir(tmp_path / "far")
    assert destination(Path(".")) == tmp_path / "far"
    assert destination(Path("new")) == Path("new")


def test_the_root_is_a_mount_point() -> None:
    with pytest.raises(FileExistsError, match=r"^/ is a mount point, which cannot be replaced; choose a folder in it"):
        destination(Path("/"))


@pytest.mark.parametrize("target", ["loop", "nowhere"])
@pytest.mark.parametrize("below", ["out", "a/b/out", "../out"])
def test_links_above_it_that_lead_nowhere(target: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(target)
    with pytest.raises(NotADirectoryError, match=r"out cannot be made: .*/loop is a symbolic link that leads nowhere"):
        destination(tmp_path / "loop" / below)


def test_a_mount_of_a_folder_of_the_same_file_system(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with BindMounts() as mount:
        mount.add(tmp_path / "disk", tmp_path / "out")
        with pytest.raises(
            FileExistsError, match="out is a mount point, which cannot be replaced; choose a folder in it"
        ):
            destination(tmp_path / "out")
        assert destination(tmp_path / "out", may_be_mounted=True) == tmp_path / "out"
        with pytest.raises(FileExistsError, match="is a mount point"), atomic_folder(tmp_path / "out"):
            pytest.fail("the work has begun")
        (tmp_path / "read-only").mkdir()
        mount.add(tmp_path, tmp_path / "read-only", "ro")
        with pytest.raises(PermissionError, match=r"disk cannot be replaced: the folder .*; choose a folder in it"):
            destination(tmp_path / "read-only" / "disk")


@pytest.mark.parametrize("extra", ["b", "a/c", "d/", "a/d/", "z"])
def test_the_first_entry_that_is_not_listed(extra: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    (tmp_path / "kept").mkdir()
    check_deletable(tmp_path, ["a/b", "missing"], "a test", besides=["kept"])
    if extra == "z":
        os.symlink("a/b", tmp_path / extra)
    elif extra.endswith("/"):
        (tmp_path / extra).mkdir()
    else:
        (tmp_path / extra).touch()
    with pytest.raises(
        FileExistsError, match=f"holds {extra.rstrip('/')}, which a test has not written and which would"
    ):
        check_deletable(tmp_path, ["a/b", "missing"], "a test", besides=["kept"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o000)
    with pytest.raises(PermissionError):
        check_deletable(tmp_path, ["a/b"], "a test")
