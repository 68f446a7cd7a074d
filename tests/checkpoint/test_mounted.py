"""OUT is a mount point, as a container's volume is: the result is built inside it and moved there entry by entry."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.run import run_job

from ..support.checkpoints import contents, small, untimed, witness
from ..support.crashing import KILLED, OPTIONS, Child
from ..support.mounts import BindMounts
from ..support.refusing import call_after, init, refused
from .test_resume import KILLS

OLD = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "residual"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A mount point, with what an ext4 file system has at its root."""
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    with BindMounts() as mount:
        mount.add(tmp_path / "disk", tmp_path / "out")
        yield tmp_path / "out"


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} - {"lost+found"}


def test_written_into(model: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to("out")
    assert init(model, out) == 0
    assert init(model, tmp_path / "plain") == 0
    assert names(out) == names(tmp_path / "plain")
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link", "out", "plain", "source"}
    refused(capsys, "out exists and is not an empty folder", model, out, code=2, left=("disk", "link", "out", "plain"))
    assert init(model, out, "--resume") == 0, "it is finished"
    assert init(model, tmp_path / "link", "--force", "--seed", 1) == 0
    assert names(out) == names(tmp_path / "plain")
    (out / "mine").touch()
    before = witness(out)
    refused(capsys, "out holds mine, which init has not written", model, out, "--force", code=2,
            left=("disk", "link", "out", "plain"))  # fmt: skip
    assert witness(out) == before


def test_another_file_system(model: Path, tmp_path: Path) -> None:
    with BindMounts() as mount:
        mount.add_tmpfs(tmp_path / "volume")
        (tmp_path / "volume" / "in").mkdir()
        (tmp_path / "link").symlink_to("volume/in")
        for out in tmp_path / "volume" / "a" / "b", tmp_path / "link":
            assert init(model, out) == 0
            assert init(model, out, "--force") == 0
            assert (out / "config.json").is_file()
        assert (tmp_path / "link").is_symlink()
        shutil.rmtree(tmp_path / "volume" / "a")
        shutil.rmtree(tmp_path / "volume" / "in")
        assert init(model, tmp_path / "volume") == 0
        assert init(model, tmp_path / "volume", "--force") == 0
        assert (tmp_path / "volume" / "config.json").is_file()


def test_a_mount_below_a_result(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To delete the old result would delete what is mounted there."""
    assert init(model, tmp_path / "out") == 0
    shutil.move(tmp_path / "out" / "pissa_init", tmp_path / "source" / "init")
    with BindMounts() as mount:
        mount.add(tmp_path / "source" / "init", tmp_path / "out" / "pissa_init")
        before = witness(tmp_path)
        words = "out holds the mount point .*/out/pissa_init; unmount it, or choose another folder"
        refused(capsys, words, model, tmp_path / "out", "--force", code=2, left=("out",))
        assert witness(tmp_path) == before


def test_files_that_appear_during_the_run_are_kept(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        call_after(patch, 5, (out / "mine").touch)
        words = "out has come to exist during the run; move it away, then --resume"
        refused(capsys, words, model, out, code=2, left=("disk", "out"))
    assert names(out) == {"mine", ".out.unfinished"}
    refused(capsys, "out exists and is not an empty folder", model, out, "--resume", code=2, left=("disk", "out"))
    (out / "mine").unlink()
    assert init(model, out, "--resume") == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("replace", [False, True])
def test_killed_while_it_is_published(replace: bool, source: Path, out: Path) -> None:
    """At every step of the publication: what has config.json is whole, and the next run ends with the same bytes."""

    def prepare() -> None:
        for path in out.iterdir():
            if path.name != "lost+found":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if replace:
            shutil.copytree(OLD, out, dirs_exist_ok=True)

    prepare()
    child = Child(source, out, workers=1, force=replace, resume=False)
    child.begun()
    assert child.ended() == 0
    steps = child.outcome()[1]
    expected = untimed(out)
    old = {name: content for name, content in contents(OLD).items() if content is not None}
    # from the last fsync of a file on; all steps, or those that move and delete folders
    first = next(number for number, name in enumerate(steps) if steps[number:].count("fsync") < 4)
    fatal = [step for step in range(first, len(steps)) if KILLS > 100 or steps[step] in ("replace", "mkdir", "rmdir")]
    partial = 0
    for step in fatal:
        recovery: dict[str, Any] = {"resume": True} if step % 2 else {"force": True}
        prepare()
        child = Child(source, out, workers=1, step=step, force=replace, resume=False)
        assert child.ended() == KILLED
        found = contents(out)
        if "config.json" in found:  # a loader accepts it
            assert all(found.get(name) == content for name, content in old.items()) or all(
                found.get(name) is not None for name, content in expected.items() if content is not None
            )
        else:
            partial += 1
        if replace:
            kept = [{found.get(name), found.get(f".out.unfinished/replaced/{name}")} for name in old]
            assert "config.json" in found or all(old[name] in found for name, found in zip(old, kept, strict=True))
        run_job(plan_checkpoint(source, out, OPTIONS), progress=False, **{"force": replace, **recovery})
        assert untimed(out) == expected, f"killed at step {step}, {steps[step]}"
    assert partial >= 3, "it was killed between the moves"
    assert os.path.ismount(out) or out.stat().st_ino == (out.parent / "disk").stat().st_ino
