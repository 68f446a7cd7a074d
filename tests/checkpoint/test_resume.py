"""Runs that are killed at any moment are resumed, and end with the bytes of a run that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.run import CheckpointReport, run_job

from ..support.checkpoints import ADAPTER, contents, header, small, untimed, witness
from ..support.crashing import KILLED, OPTIONS, TORN, Child

# Kills of test_killed_at_any_moment. With more than there are steps, test_killed_at_each_step takes all of them.
KILLS = int(os.environ.get("PISSA_KERNELS_KILLS", "25"))
TENSORS = 12
# A result of another run, by version 0.1.0.
OLD = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "residual"


@dataclass
class Undisturbed:
    """A run that was not killed.

    Attributes:
        model, out: folders of the source and of the result.
        expected: everything beside and below ``out``, without times.
        source: what ``model`` held.
        seconds: time of the run, without the plan.
        steps: names of the run's steps, in order.
    """

    model: Path
    out: Path
    expected: dict[str, Any]
    source: dict[str, Any]
    seconds: float
    steps: list[str]

    def check(self, what: str = "") -> None:
        """Check that the result is complete and nothing else is left, and delete it."""
        found = untimed(self.out.parent)
        assert found.keys() == self.expected.keys(), what
        assert [name for name in found if found[name] != self.expected[name]] == [], what
        assert witness(self.model) == self.source
        self.clear()

    def clear(self) -> None:
        for path in self.out.parent.iterdir():
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    model = small(tmp_path_factory.mktemp("source") / "model")
    out = tmp_path_factory.mktemp("results") / "out"
    source = witness(model)
    child = Child(model, out, workers=1)
    child.begun()
    assert child.ended() == 0
    seconds, steps = child.outcome()
    found = Undisturbed(model, out, untimed(out.parent), source, seconds, steps)
    found.check()
    return found


@pytest.fixture(autouse=True)
def _clear(undisturbed: Undisturbed) -> Iterator[None]:
    yield
    undisturbed.clear()


def resume(undisturbed: Undisturbed, **changes: Any) -> CheckpointReport:
    return run_job(plan_checkpoint(undisturbed.model, undisturbed.out, OPTIONS), resume=True, progress=False, **changes)


@pytest.mark.slow
def test_killed_at_any_moment(undisturbed: Undisturbed) -> None:
    """Each run is killed, resumed and killed again until one ends by itself."""
    draw = random.Random(0)
    kills = 0
    while kills < KILLS:
        child = Child(undisturbed.model, undisturbed.out, workers=2)
        child.begun()
        time.sleep(draw.uniform(0, undisturbed.seconds))
        child.kill()
        code = child.ended()
        assert code in (0, KILLED)
        if code == KILLED:
            kills += 1
        else:
            undisturbed.check()
    resume(undisturbed)
    undisturbed.check()


def fatal_steps(steps: list[str]) -> list[tuple[int, bool]]:
    """Numbers of steps, and whether to kill in the middle of them: all, or a third but for the last ten."""
    fatal = [(step, torn) for step, name in enumerate(steps) for torn in ([False, True] if name in TORN else [False])]
    return fatal if len(fatal) <= KILLS else [one for one in fatal if one[0] % 3 == 0 or one[0] >= len(steps) - 10]


@pytest.mark.slow
def test_killed_at_each_step(undisturbed: Undisturbed) -> None:
    for step, torn in fatal_steps(undisturbed.steps):
        child = Child(undisturbed.model, undisturbed.out, workers=1, step=step, torn=torn)
        assert child.ended() == KILLED
        resume(undisturbed)
        undisturbed.check(f"killed at step {step}, {undisturbed.steps[step]}")


@pytest.mark.slow
def test_killed_while_a_result_is_replaced(undisturbed: Undisturbed) -> None:
    """The old result is at OUT or in the folder of the run until the new one is at OUT."""
    for step in range(len(undisturbed.steps) - 10, len(undisturbed.steps) + 3):
        shutil.copytree(OLD, undisturbed.out)
        child = Child(undisturbed.model, undisturbed.out, workers=1, step=step, force=True, resume=False)
        assert child.ended() == KILLED
        found = contents(undisturbed.out.parent)
        old = {name: content for name, content in contents(OLD).items() if content is not None}
        places = [{name: found.get(f"{place}/{name}") for name in old} for place in ("out", ".out.unfinished/replaced")]
        new = {name: content for name, content in undisturbed.expected.items() if name.startswith("out/")}
        assert old in places or {f"out/{name}": content for name, content in untimed(undisturbed.out).items()} == new
        resume(undisturbed)
        undisturbed.check(f"killed at step {step} of a run that replaces a result")


@pytest.mark.slow
def test_killed_while_an_empty_folder_is_replaced(undisturbed: Undisturbed) -> None:
    for step in range(len(undisturbed.steps) - 10, len(undisturbed.steps)):
        undisturbed.out.mkdir()
        child = Child(undisturbed.model, undisturbed.out, workers=1, step=step)
        assert child.ended() == KILLED
        assert undisturbed.out.is_dir()
        resume(undisturbed)
        undisturbed.check(f"killed at step {step} of a run that replaces an empty folder")


def test_unfinished_run_needs_resume_or_force(undisturbed: Undisturbed) -> None:
    journal = undisturbed.out.parent / ".out.unfinished" / "journal-0.jsonl"
    unfinished(undisturbed)
    before = witness(undisturbed.out.parent)
    with pytest.raises(FileExistsError, match="out has an unfinished run; --resume continues it, --force starts"):
        run_job(plan_checkpoint(undisturbed.model, undisturbed.out, OPTIONS), progress=False)
    assert witness(undisturbed.out.parent) == before
    lines = len(journal.read_text().splitlines())
    outcome = resume(undisturbed)
    assert (outcome.kept, outcome.written) == (lines, TENSORS - lines)
    assert outcome.seconds is None, "the time of the killed run is not known"
    undisturbed.check()
    unfinished(undisturbed)
    outcome = run_job(plan_checkpoint(undisturbed.model, undisturbed.out, OPTIONS), force=True, progress=False)
    assert (outcome.kept, outcome.written) == (0, TENSORS)
    undisturbed.check()


def test_finished_result_is_not_written_again(undisturbed: Undisturbed) -> None:
    resume(undisturbed)
    before = witness(undisturbed.out)
    outcome = resume(undisturbed)
    assert (outcome.kept, outcome.written) == (TENSORS, 0)
    assert witness(undisturbed.out) == before


@pytest.mark.parametrize("what", ["residual", "factor", "journal", "header", "end", "file"])
def test_lost_bytes_are_written_again(undisturbed: Undisturbed, what: str) -> None:
    """As after a power cut: tensors are in the journal, but their bytes did not reach the disk."""
    unfinished(undisturbed)
    folder = undisturbed.out.parent / ".out.unfinished"
    journal = folder / "journal-0.jsonl"
    record = next(record for record in map(json.loads, journal.read_text().splitlines()) if "adapter" in record)
    if what == "journal":
        journal.write_text('{"shard": "model-0\n\0\0\0\0{"half": 1}\n[]\n7\n' + journal.read_text()[:-9])
    else:
        damaged = folder / "out" / (ADAPTER if what == "factor" else record["shard"])
        content = damaged.read_bytes()
        start = len(header(damaged))
        content = {
            "header": bytes(start) + content[start:],
            "end": content[: start + 10],
            "file": b"",
        }.get(what, content[:start] + bytes(len(content) - start))
        damaged.write_bytes(content)
        if what == "file":
            damaged.unlink()
    resume(undisturbed)
    undisturbed.check()


def unfinished(undisturbed: Undisturbed) -> None:
    """Kill a run at the journal line of its eighth tensor."""
    child = Child(undisturbed.model, undisturbed.out, workers=1, step=("journal", 7))
    assert child.ended() == KILLED
