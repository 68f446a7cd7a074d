"""``python -m bench.split``: where the time of ``truncated_svd`` goes, case by case.

Products with the weight, orthonormalisation, small dense problems, the measurement of the residual, and the rest. Each
part is timed exclusively, by wrapping the engine's own functions for the length of a run; on a GPU every boundary waits
for the device, so the sum is an upper bound there.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor

import pissa_kernels
from pissa_kernels.svd import chebyshev, krylov, rayleigh_ritz
from pissa_kernels.svd.operators import GramOperator, WeightOperator

from .suites import SUITES

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "products": (
        (WeightOperator, "apply"),
        (WeightOperator, "adjoint"),
        (WeightOperator, "_both"),
        (WeightOperator, "gram"),
        (GramOperator, "multiply"),
    ),
    "orthonormalisation": (
        (krylov, "orthonormalize"),
        (chebyshev, "orthonormalize"),
        (rayleigh_ritz, "orthonormalize"),
    ),
    "small problems": ((torch.linalg, "eigh"), (torch.linalg, "eigvalsh"), (torch.linalg, "svd")),
    "residual": ((rayleigh_ritz, "_measured"),),
}
REST = "rest"


class Clock:
    """Seconds by part, each instant counted for the innermost part that is running, the residual always for itself."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = dict.fromkeys((*PARTS, REST), 0.0)
        self.running = [REST]
        self.since = self._now()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _charge(self) -> None:
        now = self._now()
        part = "residual" if "residual" in self.running else self.running[-1]
        self.seconds[part] += now - self.since
        self.since = now

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._charge()
            self.running.append(part)
            try:
                return function(*arguments, **keywords)
            finally:
                self._charge()
                self.running.pop()

        return timed


@contextlib.contextmanager
def clocked(device: str) -> Iterator[Clock]:
    """A clock that runs while the block does."""
    clock = Clock(device)
    with contextlib.ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, clock.wrap(part, getattr(owner, name))))
        clock.since = clock._now()
        yield clock
        clock._charge()


def split(weight: Tensor, rank: int, niter: int | None = None, repeats: int = 3) -> dict[str, float]:
    """Milliseconds by part, of the fastest of several runs."""
    runs = []
    for _ in range(repeats + 1):  # the first warms up
        with clocked(weight.device.type) as clock:
            pissa_kernels.truncated_svd(weight, rank, niter=niter)
        runs.append({part: seconds * 1e3 for part, seconds in clock.seconds.items()})
    return min(runs[1:], key=lambda run: sum(run.values()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.split", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="engine")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", metavar="REGEX", help="what the case's name must contain")
    parser.add_argument("--niter", type=int, metavar="N", help="match N rounds instead of the tolerance")
    arguments = parser.parse_args()
    lines = []
    for case in SUITES[arguments.suite].cases:
        if re.search(arguments.only, case.name):
            weight = case.weight(arguments.device)
            parts = split(weight.mT if case.fan_in_fan_out else weight, case.rank, arguments.niter)
            lines.append((case.name, sum(parts.values()), *parts.values()))
    headers = ("case", "total ms", *PARTS, REST)
    print(tabulate(lines, headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
