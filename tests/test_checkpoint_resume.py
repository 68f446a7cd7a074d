"""Runs that die at any moment are gone on with, and end at the bytes of one that nothing disturbed."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pissa_kernels.checkpoint.init import Outcome, init_checkpoint
from pissa_kernels.checkpoint.plan import make_plan

from .checkpoints import contents, small, untimed, witness
from .crashing import KILLED, OPTIONS, Child

# The ordinary number takes seconds; many more were run before a release.
KILLS = int(os.environ.get("PISSA_KERNELS_KILLS", "25"))
TORN = ("pwritev", "journal")


@dataclass
class Undisturbed:
    """A run that nothing disturbed.

    Attributes:
        model, out: from where to where.
        expected: everything beside and below ``out``, without times.
        source: of ``model``, for comparison.
        seconds: from when all was planned.
        steps: what it did to the file system, in order.
    """

    model: Path
    out: Path
    expected: dict[str, Any]
    source: dict[str, Any]
    seconds: float
    steps: list[str]

    def check(self, what: str = "") -> None:
        """The result is there, the same, alone; the next run can begin."""
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


def resume(undisturbed: Undisturbed, **changes: Any) -> Outcome:
    return init_checkpoint(make_plan(undisturbed.model, undisturbed.out, OPTIONS), resume=True, shown=False, **changes)


def test_killed_at_any_moment(undisturbed: Undisturbed) -> None:
    """Each run is killed, resumed, killed again, until one gets to its end."""
    draw = random.Random(0)
    kills = ends = 0
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
            ends += 1
            undisturbed.check()
    resume(undisturbed)
    undisturbed.check()


def steps_to_die_at(steps: list[str]) -> list[tuple[int, bool]]:
    """Which steps, and whether after half of a write: all of them, or a third of what many files and tensors repeat."""
    dies = [(step, torn) for step, name in enumerate(steps) for torn in ([False, True] if name in TORN else [False])]
    return dies if KILLS >= len(dies) else [die for die in dies if die[0] % 3 == 0 or die[0] >= len(steps) - 10]


@pytest.mark.slow
def test_killed_at_each_step(undisturbed: Undisturbed) -> None:
    for step, torn in steps_to_die_at(undisturbed.steps):
        child = Child(undisturbed.model, undisturbed.out, workers=1, step=step, torn=torn)
        assert child.ended() == KILLED
        resume(undisturbed)
        undisturbed.check(f"killed at step {step}, {undisturbed.steps[step]}")
