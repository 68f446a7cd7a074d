"""Runs of one to four processes, one of which is killed at a random step, until they have been killed often enough.

``python -m tests.support.kills --count 200`` resumes each killed run with another number of processes. Every run that
ends by itself has to leave the bytes of one process that nobody has killed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoints import small, untimed, witness
from .crashing import KILLED, Child, Processes, start

# Two and more are drawn twice as often.
WORLDS = (1, 2, 2, 3, 3, 4, 4)
# Steps of process 0 are below this in most runs, and those of another process, which only writes tensors.
STEPS, OTHER_STEPS = 90, 10
# A survivor ends within a second of the kill, but for what it has in work and the load of the machine.
SURVIVOR_SECONDS = 30.0
# Slow enough for each process to get tensors, in a run of a tenth of a second.
PACED = Processes(pace=0.01)


@dataclass
class Kills:
    """What has happened.

    Attributes:
        killed: kills, by the number of processes.
        firsts: kills of process 0.
        missed: runs that ended before their fatal step.
        completed: runs whose bytes were compared.
        chain: most kills before a run was complete.
        slowest: seconds from the first to the last end of the processes of a killed run, at most.
    """

    killed: Counter[int] = field(default_factory=Counter)
    firsts: int = 0
    missed: int = 0
    completed: int = 0
    chain: int = 0
    slowest: float = 0.0

    def __str__(self) -> str:
        by_world = ", ".join(f"{self.killed[world]} of {world}" for world in sorted(set(WORLDS)))
        return (
            f"{self.killed.total()} kills ({by_world} processes; {self.firsts} of process 0), {self.missed} missed, "
            f"{self.completed} runs completed with equal bytes, at most {self.chain} kills in one, survivors ended "
            f"within {self.slowest:.1f} s"
        )


def kill(model: Path, out: Path, count: int, seed: int) -> Kills:
    """Kill ``count`` processes of runs from ``model`` to ``out``, whose parent holds nothing else.

    Raises:
        AssertionError: a run hung, failed by itself, said something else than that a process is lost, or wrote other
            bytes.
    """
    draw, kills, chain = random.Random(seed), Kills(), 0
    (child,) = start(model, out, 1)
    assert child.ended() == 0, child.outcomes()
    expected, source = untimed(out.parent), witness(model)
    shutil.rmtree(out)
    world = draw.choice(WORLDS)
    while kills.killed.total() < count or chain:
        enough = kills.killed.total() >= count
        victim = draw.randrange(world)
        step = draw.randrange(OTHER_STEPS if victim else STEPS)
        fatal = {} if enough else {victim: step}
        what = f"seed {seed}, {kills}: process {victim} of {world} killed at step {step}"
        children = start(model, out, world, fatal, processes=PACED, torn=draw.random() < 0.5)
        codes, seconds = _ended(children)
        if fatal and codes[victim] == KILLED:
            kills.killed[world] += 1
            kills.firsts += victim == 0
            chain += 1
            kills.chain, kills.slowest = max(kills.chain, chain), max(kills.slowest, seconds)
            for rank in set(range(world)) - {victim}:
                _check_survivor(children[rank], codes[rank], victim, what)
            world = draw.choice([other for other in WORLDS if other != world])
            continue
        assert codes == [0] * world, (what, [child.outcomes() for child in children])
        found = untimed(out.parent)
        assert found.keys() == expected.keys(), what
        assert [name for name in found if found[name] != expected[name]] == [], what
        assert witness(model) == source, what
        kills.completed += 1
        kills.missed += bool(fatal)
        chain = 0
        shutil.rmtree(out)
        world = draw.choice(WORLDS)
    return kills


def _ended(children: list[Child]) -> tuple[list[int], float]:
    """Exit codes, and seconds from the first to the last end."""
    while all(child.is_alive() for child in children):
        time.sleep(0.005)
    first = time.monotonic()
    return [child.ended() for child in children], time.monotonic() - first


def _check_survivor(child: Child, code: int, victim: int, what: str) -> None:
    """A survivor names the lost process, unless it has met it neither."""
    assert code == 1, (what, code)
    outcomes: list[Any] = child.outcomes()
    assert len(outcomes) == 3, (what, outcomes)
    assert outcomes[1].startswith(f"ProcessLost: process {victim} (host "), (what, outcomes[:2])
    assert "was killed, or its connection was cut" in outcomes[1], (what, outcomes[:2])
    assert "--resume continues with any number of processes" in outcomes[1], (what, outcomes[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn from the time")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (out := Path(folder, "results", "out")).parent.mkdir()
        kills = kill(small(Path(folder, "model")), out, arguments.count, seed)
    print(f"seed {seed}: {kills}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
