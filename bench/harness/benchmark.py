"""The command line and the loop of every benchmark: for each case, measure, write the rows, print the table."""

from __future__ import annotations

import abc
import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from .. import commands
from . import environment
from .paths import RESULTS
from .rows import Row, read_rows, write_row
from .table import table

GATE = (
    "The accuracy of every provider is compared with a float64 reference. A provider that exceeds the limits gets no "
    "times, and the exit status is 1."
)


class Case(Protocol):
    """What a benchmark measures on; a dataclass whose fields go into the row."""

    @property
    def name(self) -> str: ...


CaseT = TypeVar("CaseT", bound=Case)


@dataclass(frozen=True)
class Settings:
    """Options that a measurement depends on.

    Attributes:
        device: "cpu" or "cuda".
        repeats: number of timed runs of each provider.
        memory: whether to measure peak memory.
    """

    device: str
    repeats: int
    memory: bool


class Benchmark(abc.ABC, Generic[CaseT]):
    """One benchmark: its cases, and how one of them is measured.

    Attributes:
        name: name of the command, and stem of the file of rows.
        repeats: default of ``--repeats``.
        providers: names that ``--providers`` accepts; empty for a benchmark without this option.
        measures_memory: whether memory is measured in separate fresh processes, which ``--no-memory`` skips.
    """

    name: str
    repeats: ClassVar[int] = 10
    providers: ClassVar[tuple[str, ...]] = ()
    measures_memory: ClassVar[bool] = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add options of this benchmark to the common ones."""

    @abc.abstractmethod
    def select(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[tuple[CaseT, list[str]]]:
        """The cases, each with the names of its providers; calls ``parser.error`` for options that do not fit."""

    @abc.abstractmethod
    def measure(self, case: CaseT, providers: Sequence[str], settings: Settings) -> Iterable[Row]:
        """One row per provider."""

    def table(self, rows: list[Row]) -> str:
        """The rows as text."""
        return table(rows)


def run(benchmark: Benchmark[Any], argv: Sequence[str] | None = None) -> int:
    """Run a benchmark from its command line; 0 if every row passed its gate, otherwise 1."""
    arguments = parse(benchmark, argv)
    settings = Settings(arguments.device, arguments.repeats, memory=not arguments.no_memory)
    about = environment.about(arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    passed = True
    with arguments.out.open("a" if arguments.append else "w", encoding="utf-8") as file:
        for case, providers in arguments.selection:
            print(case.name, file=sys.stderr, flush=True)
            for row in benchmark.measure(case, providers, settings):
                write_row(file, row | about)
                passed &= bool(row["ok"])
    print(benchmark.table(read_rows(arguments.out)))
    return 0 if passed else 1


def parse(benchmark: Benchmark[Any], argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with ``selection``: the cases to measure, each with the names of its providers."""
    parser = commands.parser(benchmark.name, GATE)
    benchmark.add_arguments(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default: cpu)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=benchmark.repeats,
        metavar="N",
        help=f"timed runs of each provider (default: {benchmark.repeats})",
    )
    if benchmark.providers:
        parser.add_argument(
            "--providers", nargs="+", choices=benchmark.providers, metavar="NAME", help=_names(benchmark.providers)
        )
    parser.add_argument("--only", default="", metavar="REGEX", help='measure only where "CASE/PROVIDER" matches REGEX')
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"file of rows (default: bench/results/{benchmark.name}-DEVICE.jsonl)"
    )
    parser.add_argument("--append", action="store_true", help="keep the rows that FILE contains")
    if benchmark.measures_memory:
        parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    arguments = parser.parse_args(argv, argparse.Namespace(no_memory=False, providers=None))
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    arguments.out = arguments.out or RESULTS / f"{benchmark.name}-{arguments.device}.jsonl"
    try:
        arguments.selection = _matching(benchmark.select(parser, arguments), arguments.only)
    except re.error as error:
        parser.error(f"--only is not a regular expression: {error}")
    if not arguments.selection:
        parser.error(f"--only {arguments.only!r} matches no case and provider of {benchmark.name!r}")
    return arguments


def _matching(selection: list[tuple[CaseT, list[str]]], only: str) -> list[tuple[CaseT, list[str]]]:
    pattern = re.compile(only)
    found = [(case, [name for name in names if pattern.search(f"{case.name}/{name}")]) for case, names in selection]
    return [(case, names) for case, names in found if names]


def _names(providers: Sequence[str]) -> str:
    return "providers to measure, from: " + "; ".join(providers)
