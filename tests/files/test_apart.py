"""Folders that must not be written because something in them is read: by path, through links, by inode, by mount."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.files.apart import check_apart
from pissa_kernels.files.places import Places

from ..support.mounts import BindMounts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the folder that is read, ``a/model``, and the folder ``b`` beside its parent."""
    (tmp_path / "a" / "model" / "code").mkdir(parents=True)
    (tmp_path / "a" / "model" / "config.json").write_text("{}")
    (tmp_path / "a" / "model" / "code" / "modeling.py").write_text("")
    (tmp_path / "b").mkdir()
    return tmp_path


def refusal(written: Path, *read: Path) -> str:
    with pytest.raises(FileExistsError) as raised:
        check_apart([written], read)
    return str(raised.value)


def test_folders_beside_it_are_accepted(root: Path) -> None:
    written = ["b", "c", "b/out", "a/out", "a/model2", "a/.out.unfinished", "a/mod", "a/model/../out"]
    check_apart([root / name for name in written], [root / "a" / "model", root / "b" / "missing"])


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("a/model", "is {read}"),
        ("a/model/out", "is in {read}"),
        ("a/model/code/deep/out", "is in {read}/code"),
        ("a/model/.git/out", "is in {read}"),
        ("b/../a/model/out", "is in {read}"),
        ("a/model/config.json", "is in {read}"),
        ("a", "holds {read}"),
        ("", "holds {read}"),
        ("a/model/..", "holds {read}"),
    ],
)
def test_paths(written: str, words: str, root: Path) -> None:
    read = root / "a" / "model"
    end = "; choose another folder" if words.startswith("holds") else " and must not be written to"
    assert refusal(root / written, read) == f"{root / written} {words.format(read=read)}, which is read{end}"


def test_relative_paths(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "a")
    assert refusal(Path("."), Path("model")) == f". holds {root}/a/model, which is read; choose another folder"
    assert refusal(Path("model/out"), root / "a" / "model").startswith("model/out is in ")
    monkeypatch.chdir(root / "a" / "model")
    assert refusal(root / "a", Path(".")).startswith(f"{root}/a holds ")
    check_apart([Path("../out")], [Path(".")])


def test_files_that_are_read(root: Path) -> None:
    file = root / "a" / "model" / "config.json"
    assert refusal(root / "a" / "model", file).endswith(f"holds {file}, which is read; choose another folder")
    assert refusal(file, file).endswith(f"holds {file}, which is read; choose another folder")
    check_apart([root / "a" / "model" / "out", root / "b"], [file])


# by name: symbolic links as {place: target}, what is read, what is written, words
LINKS: dict[str, tuple[dict[str, str], str, str, str]] = {
    "written: a link to it": ({"l": "a/model"}, "a/model", "l", "is .*/a/model,"),
    "written: a link to a folder in it": ({"l": "a/model/code"}, "a/model", "l", "is .*/a/model/code,"),
    "written: a link to the folder above": ({"l": "a"}, "a/model", "l", "holds .*/a/model,"),
    "written: through a link, in it": ({"l": "a"}, "a/model", "l/model/out", "is in .*/a/model,"),
    "written: a link in it": ({"a/model/l": "../../b"}, "a/model", "a/model/l", "is .*/a/model/l,|is in .*/a/model,"),
    "written: a dangling link in it": ({"a/model/l": "../../c/d"}, "a/model", "a/model/l", "is in .*/a/model,"),
    "read: a link, written: its target": ({"l": "a/model"}, "l", "a/model", "is .*/l,"),
    "read: a link, written: in its target": ({"l": "a/model"}, "l", "a/model/out", "is in .*/l,"),
    "read: a link, written: above its target": ({"l": "a/model"}, "l", "a", "holds .*/l,"),
    "read: through a link": ({"l": "a"}, "l/model", "a", "holds .*/l/model,"),
    "read: a link, written: above the link": ({"b/l": "../a/model"}, "b/l", "b", "holds .*/b/l,"),
    "read: through a link, written: above it": ({"b/l": "../a"}, "b/l/model", "b", "holds .*/b/l/model,"),
    "read: two links, written: above the second": ({"l": "b/m", "b/m": "../a"}, "l/model", "b", "holds .*/l/model,"),
    "read: a linked folder inside": ({"a/model/more": "../../b"}, "a/model", "b", "is .*/a/model/more,"),
    "read: a linked folder inside, written: in it": ({"a/model/more": "../../b"}, "a/model", "b/out", "is in .*/more,"),
    "both: links": ({"l": "a", "m": "a/model"}, "m", "l", "holds .*/m,"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINKS)
def test_symbolic_links(case: str, root: Path) -> None:
    links, read, written, words = LINKS[case]
    (root / "b" / "notes.txt").write_text("")
    for place, target in links.items():
        (root / place).symlink_to(target)
    assert re.search(f"^{root / written} ({words})", refusal(root / written, root / read))
    check_apart([root / "c"], [root / read])


def hub(root: Path) -> Path:
    """A snapshot in a cache as huggingface_hub lays it out: links to files in a folder of blobs."""
    blobs, snapshot = root / "hub" / "blobs", root / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors")):
        (blobs / f"{number}").write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize(
    ("written", "found"),
    [("blobs", "/config.json"), ("", ""), ("snapshots", ""), ("snapshots/main", ""), ("snapshots/main/out", "")],
)
def test_snapshot_of_links(written: str, found: str, root: Path) -> None:
    snapshot = hub(root)
    assert f" {snapshot}{found}, which is read" in refusal(root / "hub" / written, snapshot)
    check_apart([root / "hub" / "snapshots" / "other", root / "hub" / "blobs2"], [snapshot])


def test_dangling_and_looping_links_inside(root: Path) -> None:
    (root / "a" / "model" / "dangling").symlink_to("nowhere")
    (root / "a" / "model" / "loop").symlink_to("loop")
    check_apart([root / "b"], [root / "a" / "model"])
    assert "holds" in refusal(root / "a", root / "a" / "model")


def test_links_to_folders_above_them(root: Path) -> None:
    """Each of the links would double the folders of each level."""
    for name in "lmno":
        (root / "a" / "model" / name).symlink_to(".")
        (root / "a" / "model" / "code" / name).symlink_to("..")
    check_apart([root / "b"], [root / "a" / "model"])
    assert "is in" in refusal(root / "a" / "model" / "code" / "out", root / "a" / "model")


def test_same_inode(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As through a bind mount where the system does not list mounts, and for names that differ in case."""
    stat = os.stat
    same = {str(root / "b"): root / "a", str(root / "b" / "model"): root / "a" / "model"}

    def mounted(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        return stat(same.get(str(path), path), *arguments, **options)

    check_apart([root / "b", root / "b" / "model"], [root / "a" / "model"])
    monkeypatch.setattr(os, "stat", mounted)
    read = root / "a" / "model"
    assert refusal(root / "b", read) == f"{root}/b holds {read}, which is read; choose another folder"
    assert refusal(root / "b" / "model", read).endswith(f"is {read}, which is read and must not be written to")
    assert refusal(root / "b" / "model" / "out", read).endswith(
        f"is in {read}, which is read and must not be written to"
    )


# Mounts


# by name: bind mounts as {mount point: folder}, what is read, what is written, words
MOUNTS: dict[str, tuple[dict[str, str], str, str, str]] = {
    "it": ({"m": "a/model"}, "a/model", "m", "is .*/a/model,"),
    "in it": ({"m": "a/model"}, "a/model", "m/out", "is in .*/a/model,"),
    "a folder mounted in it": ({"a/model/m": "b"}, "a/model", "b", "is .*/a/model/m,"),
    "in it, through the folder above": ({"m": "a"}, "a/model", "m/model/out", "is in .*/a/model,"),
    "the folder above": ({"m": "a"}, "a/model", "m", "holds .*/a/model,"),
    "a folder in it": ({"m": "a/model/code"}, "a/model", "m", "is .*/a/model/code,"),
    "in a folder in it": ({"m": "a/model/code"}, "a/model", "m/deep/out", "is in .*/a/model/code,"),
    "in a folder in it that is not read": ({"m": "a/model/.git"}, "a/model", "m/out", "is in .*/a/model,"),
    "it is mounted in what is written": ({"b/deep/m": "a/model"}, "a/model", "b", "holds .*/a/model,"),
    "a folder in it is mounted in what is written": ({"b/m": "a/model/code"}, "a/model", "b", "holds .*/model/code,"),
    "the folder above is mounted in what is written": ({"b/m": "a"}, "a/model", "b", "holds .*/a/model,"),
    "read through a mount": ({"m": "a/model"}, "m", "a/model", "is .*/m,"),
    "read through a mount, written: in the folder": ({"m": "a/model"}, "m", "a/model/out", "is in .*/m,"),
    "read through a mount, written: above the folder": ({"m": "a/model"}, "m", "a", "holds .*/m,"),
    "read and written through mounts": ({"m": "a/model", "n": "a"}, "m", "n", "holds .*/m,"),
    "a name with a space and a backslash": ({r"m\0 x": "a/model/.git"}, "a/model", r"m\0 x/out", "is in .*/a/model,"),
}  # fmt: skip


@pytest.mark.parametrize("case", MOUNTS)
def test_bind_mounts(case: str, root: Path) -> None:
    mounts, read, written, words = MOUNTS[case]
    (root / "a" / "model" / ".git").mkdir()
    with BindMounts() as mount:
        for point, folder in mounts.items():
            mount.add(root / folder, root / point)
        assert re.search(f"^{re.escape(str(root / written))} ({words})", refusal(root / written, root / read))
        check_apart([root / "c", root / "a" / "out"], [root / read])


def test_mount_hides_an_earlier_one(root: Path) -> None:
    (root / "c").mkdir()
    with BindMounts() as mount:
        mount.add(root / "b", root / "a" / "model")
        mount.add(root / "c", root / "a" / "model")
        check_apart([root / "b"], [root / "a" / "model"])
        assert refusal(root / "c", root / "a" / "model").startswith(f"{root}/c is {root}/a/model, ")


def test_whole_file_systems_are_compared_by_inode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux lists two folders of one NFS export like this; their paths in the file system cannot be compared."""
    lines = "1 0 8:1 / / rw - ext4 x rw\n2 1 0:50 / /mnt/a rw - nfs host:/a rw\n3 1 0:50 / /mnt/b rw - nfs host:/b rw\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: lines)
    places = Places()
    assert not set(places.of(Path("/mnt/a/model"))) & set(places.of(Path("/mnt/b/model")))
    lines = lines.replace("0:50 / /mnt/b", "0:50 /deep /mnt/b")
    places = Places()
    assert set(places.of(Path("/mnt/a/deep/model"))) & set(places.of(Path("/mnt/b/model")))
