"""Weights in shards on CPUs: gate → time → memory → row, for each case and provider; or a prediction for GPUs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import ClassVar

from ..harness import benchmark
from ..harness.benchmark import Benchmark, Settings
from ..harness.rows import Row, fields_of, first_fields
from ..harness.timing import Times, summary
from . import forecast
from .case import CASES, Case
from .providers import PROVIDERS
from .start import found_by_processes
from .table import table
from .worker import Found

PREDICT = "--predict"


class Shards(Benchmark[Case]):
    """One weight that several processes hold, beside the whole weight in each of them and in one."""

    name = "shards"
    repeats: ClassVar[int] = 7
    providers = tuple(PROVIDERS)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            PREDICT, action="store_true", help="measure nothing; predict times on GPUs (has options of its own)"
        )

    def select(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[tuple[Case, list[str]]]:
        if arguments.device != "cpu":
            parser.error("weights in shards are measured on a CPU")
        return [(case, list(arguments.providers or PROVIDERS)) for case in CASES]

    def measure(self, case: Case, providers: Sequence[str], settings: Settings) -> Iterator[Row]:
        """Gate all providers, time those that pass, then their memory in other processes; one row each."""
        weight = case.weight()
        found = found_by_processes(case, weight, providers, repeats=settings.repeats)
        passed = [name for name in providers if found[name].reason is None]
        memory = found_by_processes(case, weight, passed, memory=True) if settings.memory and passed else {}
        for name in providers:
            peak = memory[name].peak_extra_mib if name in memory else None
            yield make_row(case, settings.device, name, found[name], peak)

    def table(self, rows: list[Row]) -> str:
        return table(rows)


def make_row(case: Case, device: str, name: str, found: Found, peak_extra_mib: float | None) -> Row:
    """One line of the results."""
    times = summary(found.seconds) if found.seconds else None
    row = first_fields(case, device, name, found.reason) | fields_of(Times, times) | ({} if times else {"repeats": 0})
    row["energy_deficit"] = found.energy_deficit
    row["collectives"], row["collective_bytes"] = found.collectives, found.bytes
    row["peak_extra_mib"] = peak_extra_mib
    return row


def main(name: str, argv: Sequence[str]) -> int:
    if PREDICT in argv:
        return forecast.main(name, [argument for argument in argv if argument != PREDICT])
    return benchmark.run(Shards(), argv)
