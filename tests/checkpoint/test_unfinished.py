"""The hidden folder of a run: one that holds what no run has made is refused by name, and kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.checkpoints import small, untimed, witness
from ..support.crashing import KILLED, Child
from ..support.mounts import BindMounts
from ..support.refusing import init, refused

OLD = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "residual"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with source/model, and the folder of a run that was killed at its eighth tensor."""
    root = tmp_path_factory.mktemp("killed")
    (root / "source").mkdir()
    child = Child(small(root / "source" / "model"), root / "out", workers=1, step=("journal", 7))
    assert child.ended() == KILLED
    return root


@pytest.fixture
def root(killed: Path, tmp_path: Path) -> Path:
    """A copy of it. The plan names the source by its path."""
    for name in ".out.unfinished", "source":
        shutil.copytree(killed / name, tmp_path / name)
    plan = tmp_path / ".out.unfinished" / "plan.json"
    plan.write_text(plan.read_text().replace(str(killed), str(tmp_path)))
    return tmp_path


def hidden(name: str, content: str = "mine") -> Callable[[Path], object]:
    """Write a file into the hidden folder."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return write


def without_plan(folder: Path) -> None:
    (folder / "plan.json").unlink()


# by name: what is done to the hidden folder, and words of the refusal
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (hidden("notes"), "holds notes, which init has not made; move it away, or choose another OUT"),
    "a file in a folder": (hidden("mine/notes"), "holds mine, which init has not made"),
    "a file in the result": (hidden("out/notes.txt"), r"holds out/notes\.txt, which init has not made"),
    "a file in a folder of the result": (hidden("out/code/more.py"), r"holds out/code, which|holds out/code/more\.py,"),
    "a file where the old result is": (hidden("replaced/mine"), "replaced holds mine, and is not a result of init"),
    "a file in the old result": (
        lambda folder: [shutil.copytree(OLD, folder / "replaced"), (folder / "replaced" / "mine").touch()],
        "replaced holds mine, which init has not written",
    ),
    "a link": (lambda folder: (folder / "link").symlink_to("../source"), "holds link, which init has not made"),
    "a file that is a link": (
        lambda folder: [(folder / "out" / "config.json").symlink_to("../../source/model/config.json")],
        r"out/config\.json is a symbolic link, which init has not made; move it away",
    ),
    "a folder that is a link": (
        lambda folder: [shutil.move(folder / "out", folder.parent / "away"), (folder / "out").symlink_to("../away")],
        "holds out, which init has not made",
    ),
    "no plan": (without_plan, r"holds journal-0\.jsonl, which init has not made"),
    "a damaged plan": (hidden("plan.json", "{"), r"is not of a run of init, as its plan\.json is damaged"),
    "another plan": (hidden("plan.json", '{"plan": 3}'), r"is not of a run of init, as its plan\.json is damaged"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_kept(case: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = FOREIGN[case]
    change(root / ".out.unfinished")
    left = tuple(path.name for path in root.iterdir() if path.name != "source")
    before = witness(root)
    for options in [], ["--force"], ["--resume"], ["--resume", "--force"]:
        refused(
            capsys, rf"\.out\.unfinished.*{words}", root / "source/model", root / "out", *options, code=2, left=left
        )
        assert witness(root) == before


@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to nowhere", "mount"])
def test_a_hidden_folder_that_is_something_else(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ".out.unfinished"
    (tmp_path / "mine").mkdir()
    with BindMounts() as mount:
        words = r"unfinished is a symbolic link, where a run makes a folder; move it away"
        if kind == "file":
            folder.touch()
            words = "unfinished is a file, where a run makes a folder; move it away"
        elif kind == "mount":
            mount.add(tmp_path / "mine", folder)
            words = "unfinished is or holds a mount point; unmount it, or choose another OUT"
        else:
            folder.symlink_to("mine" if kind == "link to a folder" else "nowhere")
        before = witness(tmp_path)
        for options in [], ["--force"], ["--resume"]:
            refused(capsys, words, model, tmp_path / "out", *options, code=2, left=("mine", ".out.unfinished"))
            assert witness(tmp_path) == before


@pytest.mark.parametrize("options", [[], ["--force"], ["--resume"]])
@pytest.mark.parametrize("step", [("mkdir", 0), ("write_text", 0), ("replace", 0)])
def test_killed_before_the_plan_is_written(
    step: tuple[str, int], options: list[str], model: Path, tmp_path: Path
) -> None:
    """The folder is empty, or holds a part of the plan; the next run takes it over."""
    child = Child(model, tmp_path / "out", workers=1, step=step, torn=True)
    assert child.ended() == KILLED
    assert not (tmp_path / ".out.unfinished" / "plan.json").exists()
    assert init(model, tmp_path / "out", *options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_copy_of_hard_links_keeps_its_bytes(root: Path) -> None:
    copy = Path(shutil.copytree(root / ".out.unfinished", root / "copy", copy_function=os.link))
    before = witness(copy)
    assert init(root / "source" / "model", root / "out", "--resume") == 0
    assert witness(copy) == before
    assert init(root / "source" / "model", root / "again") == 0
    expected = untimed(root / "again")
    found = untimed(root / "out")
    assert [name for name in expected if found[name] != expected[name]] == [
        "pissa_init/adapter_config.json",
        "pissa_manifest.json",
    ], "these name OUT"
