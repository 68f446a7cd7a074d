"""init with an OUT where something is read: refused with one line before anything is touched, whatever the options."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import pissa_kernels as pk

from ..support.checkpoints import witness
from ..support.mounts import BindMounts
from ..support.refusing import init

OPTIONS = [[], ["--force"], ["--resume"], ["--resume", "--force"], ["--dry-run", "--force"]]


def unfinished_name(root: Path) -> tuple[Path, Path]:
    (root / "source" / "model").rename(root / ".out.unfinished")
    return root / ".out.unfinished", root / "out"


def link(place: Path, target: str) -> Path:
    place.symlink_to(target)
    return place


def hub(root: Path) -> Path:
    """A snapshot in a cache as huggingface_hub lays it out."""
    snapshot = root / "hub" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (root / "source" / "model").rename(root / "hub" / "blobs")
    for path in sorted((root / "hub" / "blobs").iterdir()):
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


# by name: a function of the folder that holds source/model, which returns MODEL and OUT; words of the message
CASES: dict[str, tuple[Callable[[Path], tuple[Path, Path]], str]] = {
    "equal": (lambda root: (root / "source/model", root / "source/model"), "is .*/source/model, which is read"),
    "in it": (lambda root: (root / "source/model", root / "source/model/out"), "is in .*/source/model, which is read"),
    "deep in it": (lambda root: (root / "source/model", root / "source/model/a/b/out"), "is in .*/source/model,"),
    "in it, from beside it": (lambda root: (root / "source/model", root / "source/x/../model/out"), "is in .*/model,"),
    "above it": (lambda root: (root / "source/model", root / "source"), "holds .*/source/model, which is read"),
    "two above it": (lambda root: (root / "source/model", root), "holds .*/source/model, which is read"),
    "a link to it": (lambda root: (root / "source/model", link(root / "out", "source/model")), "is .*/source/model,"),
    "a link to the folder above": (
        lambda root: (root / "source/model", link(root / "out", "source")),
        "holds .*model,",
    ),
    "MODEL a link": (lambda root: (link(root / "m", "source/model"), root / "source/model"), "is .*/m, which is read"),
    "MODEL a link, above": (lambda root: (link(root / "m", "source/model"), root / "source"), "holds .*/m, which"),
    "MODEL a link in OUT": (
        lambda root: (link(root / "source/m", str(shutil.move(root / "source/model", root / "b"))), root / "source"),
        "holds .*/source/m, which is read",
    ),
    "links, OUT the blobs": (lambda root: (hub(root), root / "hub/blobs"), "holds .*/main/code, which is read"),
    "links, OUT above the blobs": (lambda root: (hub(root), root / "hub"), "holds .*/hub/snapshots/main, which is"),
    "links, OUT the snapshots": (lambda root: (hub(root), root / "hub/snapshots"), "holds .*/snapshots/main, which"),
    "the hidden folder": (unfinished_name, r"\.out\.unfinished is .*/\.out\.unfinished, which is read"),
    "the hidden folder of another run": (
        lambda root: (root / "source/model", root / ".x.unfinished"),
        r"/\.x\.unfinished: \.x\.unfinished is named like the folder of an unfinished run; choose another",
    ),
    "in the hidden folder of another run": (
        lambda root: (root / "source/model", root / ".x.unfinished" / "out"),
        r"\.x\.unfinished is named like the folder of an unfinished run; choose another",
    ),
}


def assert_refused(capsys: pytest.CaptureFixture[str], root: Path, model: Path, out: Path, words: str) -> None:
    before = witness(root)
    for options in OPTIONS:
        capsys.readouterr()
        assert init(model, out, *options) == 2, options
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(rf"pissa-kernels: error: .*{words}.*\n", captured.err), captured.err
        assert witness(root) == before, options


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout, words = CASES[case]
    model, out = layout(tmp_path)
    assert_refused(capsys, tmp_path, model, out, words)


def test_refused_by_inode(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where OUT is a second mount of the folder above MODEL."""
    stat, source = os.stat, model.parent
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "stat", lambda path, **options: stat(source if str(path) == str(out) else path, **options))
    assert_refused(capsys, tmp_path, model, out, "out holds .*/source/model, which is read; choose another folder")


@pytest.mark.parametrize("place", ["out", "out/deep/model", "out/deep"])
def test_refused_through_a_bind_mount(
    place: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mounted at OUT or in it: deleting OUT would delete the files of MODEL."""
    mounted = model if place.endswith("model") else model.parent
    with BindMounts() as mount:
        mount.add(mounted, tmp_path / place)
        assert_refused(capsys, tmp_path, model, tmp_path / "out", "out holds .*/source/model, which is read")


def test_refused_by_the_function(model: Path) -> None:
    before = witness(model.parent)
    for options in {}, {"force": True}, {"resume": True}, {"resume": True, "force": True}:
        with pytest.raises(FileExistsError, match=r"source holds .*/source/model, which is read"):
            pk.init_checkpoint(model, model.parent, rank=4, progress=False, **options)
    assert witness(model.parent) == before


def test_beside_the_source_is_accepted(model: Path) -> None:
    before = witness(model)
    assert init(model, model.parent / "model2") == 0
    assert init(model, model.parent / "model2", "--force") == 0
    assert witness(model) == before
