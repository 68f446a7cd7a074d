"""``python -m bench.run``: gate → time → memory → row, for each case and provider.

A red gate means no times: the row says ``"ok": false`` and why, and the run exits 1 once everything else is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import environment, gate, kernels, memory
from .cases import Case
from .gate import Accuracy
from .providers import PROVIDERS, Provider, Subject
from .rows import Row, read_rows, write_row
from .suites import SUITES
from .table import table
from .timing import Times, interleaved, timed

# The suite of the verbs themselves, which has cases and rows of its own.
KERNELS = "kernels"
RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass
class Trial:
    """A provider on a case, filled in as the run goes on."""

    provider: Provider
    subject: Subject | None = None
    first_seconds: float = 0.0
    accuracy: Accuracy | None = None
    reason: str | None = None
    times: Times | None = None
    peak_extra_mib: float | None = None


def run_case(case: Case, providers: Sequence[Provider], *, device: str, repeats: int, with_memory: bool) -> list[Trial]:
    """Gate all providers, time the green ones, measure their memory."""
    weight = case.weight(device)
    truth = gate.reference(weight.mT if case.fan_in_fan_out else weight)
    trials = {provider.name: Trial(provider) for provider in providers}
    for provider in providers:
        # ours is held against PEFT's figure for the same number of rounds, whether or not that is wanted as a row
        if provider.family == "ours" and provider.niter is not None:
            stock = PROVIDERS[f"peft {provider.init}"]
            trials.setdefault(stock.name, Trial(stock))
    for trial in trials.values():
        attempt(trial, case, weight, truth, device)
    for trial in trials.values():
        if trial.accuracy is not None:
            against = trials.get(f"peft {trial.provider.init}")
            baseline = against.accuracy if against is not None else None
            trial.reason = gate.refusal(trial.provider, trial.accuracy, weight.dtype, baseline)
    del truth
    wanted = [trials[provider.name] for provider in providers]
    green = {trial.provider.name: trial for trial in wanted if trial.reason is None}
    subjects = {name: trial.subject for name, trial in green.items() if trial.subject is not None}
    times = interleaved(subjects, {name: trials[name].first_seconds for name in subjects}, repeats, device)
    for name, trial in green.items():
        trial.times = times[name]
        if with_memory:
            measure_memory(trial, case, weight)
    return wanted


def attempt(trial: Trial, case: Case, weight: torch.Tensor, truth: gate.Reference, device: str) -> None:
    """Run a provider once and take its figures; an exception is a reason, too."""
    try:
        subject = trial.provider.prepare(weight, case.rank, case.fan_in_fan_out)
        trial.first_seconds = timed(subject, device)
        view = weight.mT if case.fan_in_fan_out else weight
        trial.accuracy = gate.measure(trial.provider, subject.outcome(), view, case.rank, truth)
        trial.subject = subject
    except Exception as error:
        traceback.print_exc()
        trial.reason = f"raised {type(error).__name__}"  # its message may hold paths


def measure_memory(trial: Trial, case: Case, weight: torch.Tensor) -> None:
    """Peak memory in a fresh process; a provider that fails there keeps no times either."""
    try:
        trial.peak_extra_mib = memory.peak_extra_mib(trial.provider, weight, case.rank, case.fan_in_fan_out)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        trial.reason, trial.times = "failed in a process of its own", None


def make_row(case: Case, trial: Trial, device: str, about: Row) -> Row:
    """One line of the results."""
    row: Row = {"case": case.name, **dataclasses.asdict(case), "device": device, "provider": trial.provider.name}
    row |= {"ok": trial.reason is None, "reason": trial.reason}
    no_times = dict.fromkeys((field.name for field in dataclasses.fields(Times)), None) | {"repeats": 0}
    row |= dataclasses.asdict(trial.times) if trial.times else no_times
    row["peak_extra_mib"] = trial.peak_extra_mib
    no_figures = dict.fromkeys((field.name for field in dataclasses.fields(Accuracy)), None)
    return row | (dataclasses.asdict(trial.accuracy) if trial.accuracy else no_figures) | about


def select(suite: str, only: str) -> list[tuple[Case, list[Provider]]]:
    """Cases of a suite, each with those of its providers for which ``only`` is found in "case/provider"."""
    pattern = re.compile(only)
    chosen = []
    for case in SUITES[suite].cases:
        names = [name for name in SUITES[suite].providers if pattern.search(f"{case.name}/{name}")]
        providers = [PROVIDERS[name] for name in names]
        if providers:
            chosen.append((case, providers))
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    about: Row = {
        "machine": environment.machine(arguments.device),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    out: Path = arguments.out or RESULTS / f"{arguments.suite}-{arguments.device}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.suite == KERNELS:
        settings = {"device": arguments.device, "repeats": arguments.repeats, "append": arguments.append}
        settings["with_memory"] = not arguments.no_memory
        green = kernels.run_suite(arguments.chosen, out, **settings, about=about)
        print(kernels.table(read_rows(out)))
        return 0 if green else 1
    green = True
    with out.open("a" if arguments.append else "w", encoding="utf-8") as file:
        for case, providers in arguments.chosen:
            print(case.name, file=sys.stderr, flush=True)
            trials = run_case(
                case,
                providers,
                device=arguments.device,
                repeats=arguments.repeats,
                with_memory=not arguments.no_memory,
            )
            for trial in trials:
                write_row(file, make_row(case, trial, arguments.device, about))
                green &= trial.reason is None
    print(table(read_rows(out), "simple"))
    return 0 if green else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--suite", choices=(*SUITES, KERNELS), default="init")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed runs of each provider (10)")
    parser.add_argument("--only", default="", metavar="REGEX", help='what "case/provider" must contain')
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/SUITE-DEVICE.jsonl")
    parser.add_argument("--append", action="store_true", help="keep the rows that the file has")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory processes (some seconds each)")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error("--repeats takes an integer ≥ 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device")
    try:
        if arguments.suite == KERNELS:
            arguments.chosen = kernels.select(arguments.only, arguments.device)
        else:
            arguments.chosen = select(arguments.suite, arguments.only)
    except re.error as error:
        parser.error(f"--only is not a regular expression: {error}")
    if not arguments.chosen:
        parser.error(f"--only {arguments.only!r} leaves nothing of the suite {arguments.suite!r}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
