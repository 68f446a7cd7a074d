"""Whatever a command is told, every file that no run has made is there afterwards, with its bytes and its inode."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import pissa_kernels as pk
from pissa_kernels.cli import main as cli
from pissa_kernels.files.atomic import atomic_folder
from pissa_kernels.report import page, pictures

from ..convert.adapters import make
from ..support.checkpoints import small
from ..support.crashing import KILLED, Child
from ..support.mounts import BindMounts

EXAMPLES = int(os.environ.get("PISSA_KERNELS_TREES", "20"))
Before = dict[str, tuple[int, bytes | str]]

# Places in a tree, some of them in, under and above others, and paths that commands are given.
PLACES = ["a", "a/c", "a/c/d", "b", "b/c", "b/pissa_init", ".a.unfinished", ".a.unfinished/out", "b/.c.unfinished"]
FILES = ["a/README.md", "a/c/config.json", "b/model.safetensors", "b/report.html", "b/energy.png", "a/new/adapter"]
GIVEN = [*PLACES, *FILES, "new", "new/deep", "model/new", "model", "a/../b", "a/c/..", "."]
MADE = ("result", "lora", "unfinished", "pictures")
SOURCES = ("model", "trained", "residual")
OPTIONS = ["--force", "--resume"]

change = st.one_of(
    st.tuples(st.just("tree"), st.sampled_from(PLACES), st.sampled_from([*MADE, *SOURCES])),
    st.tuples(st.just("tree"), st.sampled_from(["a", "b"]), st.sampled_from(MADE)),
    st.tuples(st.just("folder"), st.sampled_from(PLACES), st.none()),
    st.tuples(st.just("file"), st.sampled_from(FILES), st.none()),
    st.tuples(st.just("link"), st.sampled_from([*PLACES, *FILES]), st.sampled_from([*GIVEN, "nowhere"])),
    st.tuples(st.just("hard link"), st.sampled_from(FILES), st.sampled_from(["model/config.json", *FILES])),
    st.tuples(st.just("mount"), st.sampled_from(PLACES), st.sampled_from([*PLACES, "model"])),
)
out = st.one_of(st.sampled_from(["a", "b"]), st.sampled_from(GIVEN))
# by name: what it reads, where it writes, its options
COMMANDS: dict[str, st.SearchStrategy[tuple[Any, str, Any]]] = {
    "init": st.tuples(st.sampled_from(["model", "model", "a", "b/c"]), out, st.sets(st.sampled_from(OPTIONS))),
    "convert": st.tuples(st.sampled_from(["residual", "residual/pissa_init", "b"]), out, st.sets(st.just("--force"))),
    "report": st.tuples(st.sampled_from(["residual", "a"]), out, st.sampled_from(["--html", "--pictures"])),
    "save": st.tuples(st.none(), out, st.none()),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each thing that a tree can hold."""
    folder = tmp_path_factory.mktemp("trees")
    make(folder)
    small(folder / "model")
    assert cli.main(["init", str(folder / "model"), str(folder / "result"), "--rank", "1"]) == 0
    pk.convert_adapter(folder / "trained", folder / "residual", folder / "lora")
    assert cli.main(["report", str(folder / "result"), "--pictures", str(folder / "pictures")]) == 0
    killed = Child(folder / "model", folder / "killed", step=("journal", 3))
    assert killed.ended() == KILLED
    (folder / ".killed.unfinished").rename(folder / "unfinished")
    return folder


def grow(root: Path, changes: list[tuple[str, str, Any]], trees: Path, mounts: BindMounts) -> set[str]:
    """Make a tree. Returns the paths of the files that runs have made."""
    for name in SOURCES:
        shutil.copytree(trees / name, root / name)
    made: set[str] = set()
    for what, place, other in changes:
        path = root / place
        event(what)
        with contextlib.suppress(OSError):
            if what == "mount":
                if os.geteuid() == 0 and path.is_dir() and (root / other).is_dir():
                    with contextlib.suppress(pytest.skip.Exception):
                        mounts.add(root / other, path)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if what == "tree" and not os.path.lexists(path):
                shutil.copytree(trees / other, path)
                if other in MADE:
                    below = path.resolve()
                    made |= {str(found.relative_to(root)) for found in below.rglob("*") if root in below.parents}
            elif what == "folder":
                path.mkdir()
            elif what == "file" and not os.path.lexists(path):
                path.write_text("mine")
            elif what == "link":
                path.symlink_to(os.path.relpath(root / other, path.parent))
            elif what == "hard link":
                os.link(root / other, path)
    return made


def files(root: Path) -> Iterator[tuple[str, Path]]:
    for path, below, names in os.walk(root):
        for name in [*names, *(name for name in below if Path(path, name).is_symlink())]:
            yield str(Path(path, name).relative_to(root)), Path(path, name)


def everything(root: Path) -> Before:
    """Inode, and contents or target, of every file and link."""
    return {
        name: (path.lstat().st_ino, os.readlink(path) if path.is_symlink() else path.read_bytes())
        for name, path in files(root)
    }


def run(root: Path, name: str, source: Any, place: str, options: Any) -> int:
    path = root / place if place != "." else root
    if name == "save":
        try:
            with atomic_folder(path) as folder:
                (folder / "model.safetensors").touch()
        except OSError:
            return 1
        return 0
    if name == "init":
        return cli.main(["init", str(root / source), str(path), "--rank", "1", *sorted(options)])
    if name == "convert":
        return cli.main(["convert", str(root / "trained"), str(root / source), str(path), *sorted(options)])
    with pytest.MonkeyPatch.context() as patch:  # to draw takes seconds
        patch.setattr(page, "render_page", lambda *_: "<html></html>")
        patch.setattr(pictures, "report_figures", lambda *_: {"energy": Figure(), "ranks": Figure()})
        return cli.main(["report", str(root / source), options, str(path)])


@pytest.mark.parametrize("name", COMMANDS)
@given(changes=st.lists(change, max_size=6), data=st.data())
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_every_file_that_no_run_has_made_is_kept(
    name: str, trees: Path, capsys: pytest.CaptureFixture[str], changes: list[tuple[str, str, Any]], data: st.DataObject
) -> None:
    source, place, options = data.draw(COMMANDS[name])
    with tempfile.TemporaryDirectory() as folder, BindMounts() as mounts:
        root = Path(folder).resolve()
        made = grow(root, changes, trees, mounts)
        before = everything(root)
        code = run(root, name, source, place, options)
        event(f"status {code}")
        capsys.readouterr()
        after = everything(root)
        changed = [path for path, found in before.items() if after.get(path) != found]
        assert [path for path in changed if path not in made] == []
        assert changed == [] or "--force" in options or name == "report" or options == {"--resume"}
