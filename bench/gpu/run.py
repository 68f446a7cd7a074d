"""The command: run the steps within a budget of minutes."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO, cast

import torch
from tabulate import tabulate

from .. import commands
from ..harness.paths import RESULTS
from ..harness.rows import read_rows
from .log import Log
from .record import ROWS, Recorder, Settings, line
from .steps import STEPS, run_step
from .worker import Worker

# Seconds by which the last step may exceed the budget.
GRACE = 30
DETAILS = (
    "Each step runs in a process of its own and writes its rows as it goes; none begins after the budget. Rows, log "
    "and profiles are in one folder; they name the card and the versions, neither host nor paths. The exit status is 1 "
    "if a row is red, 2 without a device. The steps: "
)


def main(name: str, argv: Sequence[str]) -> int:
    arguments = parse(name, argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"bench {name}: torch finds no CUDA device", file=sys.stderr)
        return 2
    began = time.time()
    settings = Settings(
        out=str(arguments.out.resolve()),
        device=arguments.device,
        layers=arguments.layers,
        width=arguments.width,
        inner=arguments.inner,
        ranks=tuple(arguments.ranks),
        ends=began + 60 * arguments.minutes,
    )
    settings.folder.mkdir(parents=True, exist_ok=True)
    rows = settings.folder / ROWS
    rows.unlink(missing_ok=True)
    with (settings.folder / "log.txt").open("w", encoding="utf-8") as file:
        log = cast(TextIO, Log(file, sys.stdout))
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            run = in_process if arguments.in_process else in_workers
            seconds = run(arguments.steps, settings)
            print(f"\n{summary(rows, seconds)}\nall in {time.time() - began:.0f} s", flush=True)
    return 0 if all(row["ok"] for row in read_rows(rows)) else 1


def parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = commands.parser(name, DETAILS + "; ".join(f"{step.name}: {step.summary}" for step in STEPS.values()) + ".")
    parser.add_argument(
        "--minutes", type=float, default=6, metavar="N", help="no step begins after them (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "gpu",
        metavar="DIR",
        help="folder for rows.jsonl, log.txt and profiles (default: bench/results/gpu)",
    )
    parser.add_argument(
        "--steps", type=_steps, default=list(STEPS), metavar="A,B", help=f"steps to run (default: {','.join(STEPS)})"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program itself")
    parser.add_argument(
        "--in-process", action="store_true", help="run the steps in this process, for compute-sanitizer"
    )
    for option, default, text in (
        ("layers", Settings.layers, "decoder layers of the model"),
        ("width", Settings.width, "hidden size"),
        ("inner", Settings.inner, "intermediate size"),
    ):
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=list(Settings.ranks), metavar="R", help="ranks (default: 128 16)"
    )
    arguments = parser.parse_args(argv)
    if arguments.width < 64 or arguments.width % 64:
        parser.error("--width must be a multiple of 64, the size of a head")
    if min(arguments.layers, arguments.inner, *arguments.ranks) < 1:
        parser.error("--layers, --inner and --ranks must be at least 1")
    if max(arguments.ranks) > min(arguments.width, arguments.inner):
        parser.error("--ranks must be at most --width and --inner")
    return arguments


def _steps(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in STEPS:
            raise argparse.ArgumentTypeError(f"no step {name!r}; the steps are {', '.join(STEPS)}")
    return [name for name in STEPS if name in names]


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Context in which SIGTERM raises ``SystemExit``, so that workers are killed as well."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@exit_on_sigterm()
def in_workers(names: Sequence[str], settings: Settings) -> dict[str, float]:
    """Run steps, each in its own process; the seconds of each."""
    spent: dict[str, float] = {}
    waiting = Worker()
    try:
        for name in names:
            if skipped(name, settings):
                continue
            worker, waiting = waiting, Worker() if name != names[-1] else waiting
            _headline(name)
            began = time.time()
            limit = min(STEPS[name].limit, settings.left() + GRACE)
            failure = worker.run(name, settings, limit, sys.stdout)
            spent[name] = time.time() - began
            if failure:
                Recorder(name, settings).row(name, "step", reason=failure)
    finally:
        waiting.kill()
    return spent


def in_process(names: Sequence[str], settings: Settings) -> dict[str, float]:
    """Run steps in this process; the seconds of each."""
    spent: dict[str, float] = {}
    for name in names:
        if not skipped(name, settings):
            _headline(name)
            began = time.time()
            run_step(name, settings)
            spent[name] = time.time() - began
    return spent


def skipped(name: str, settings: Settings) -> bool:
    """Whether the budget is spent; then a row says so."""
    if settings.left() > 0:
        return False
    Recorder(name, settings).row(name, "step", skipped="no time left")
    return True


def _headline(name: str) -> None:
    print(f"\n== {name}: {STEPS[name].summary}", flush=True)


def summary(path: Path, seconds: dict[str, float]) -> str:
    """The red rows, and a table of the steps."""
    rows = read_rows(path)
    red = [f"{row['step']}: {line(row)}" for row in rows if not row["ok"]]
    lines = []
    for name in dict.fromkeys(row["step"] for row in rows):
        group = [row for row in rows if row["step"] == name]
        bad = sum(not row["ok"] for row in group)
        verdict = "skipped" if name not in seconds else "RED" if bad else "green"
        lines.append((name, verdict, len(group), bad, f"{seconds.get(name, 0):.0f}"))
    return "\n".join([*red, "", str(tabulate(lines, ("step", "", "rows", "red", "seconds")))])
