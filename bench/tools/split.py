"""Split the time of ``truncated_svd`` into its parts.

The parts are products with the weight, orthonormalization, small dense problems, the measurement of the residual, and
the rest. Each part is timed exclusively, by wrapping the engine's functions during a run. A Rayleigh–Ritz projection is
one call and counts as products, its small problem and the orthonormalization before it included; the residual includes
the product, the orthonormalization and the small SVD before it. The Chebyshev iteration and the steps of block Krylov,
one call of csrc elsewhere, are done one by one. On a GPU every boundary between parts synchronizes the device, so that
the sum is an upper bound.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor

import pissa_kernels
from pissa_kernels.svd import chebyshev, krylov, rayleigh_ritz
from pissa_kernels.svd.operators import GramOperator
from pissa_kernels.svd.weight_operator import WeightOperator

from .. import commands
from ..initializers.suites import SUITES

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "products": (
        (WeightOperator, "apply"),
        (WeightOperator, "adjoint"),
        (WeightOperator, "both"),
        (WeightOperator, "gram"),
        (WeightOperator, "filter"),
        (WeightOperator, "ritz"),
        (GramOperator, "ritz"),
        (GramOperator, "filter"),
    ),
    "orthonormalization": (
        (krylov, "orthonormalize"),
        (chebyshev, "orthonormalize"),
        (rayleigh_ritz, "orthonormalize"),
    ),
    "small problems": ((torch.linalg, "eigh"), (torch.linalg, "eigvalsh"), (torch.linalg, "svd")),
    "residual": ((WeightOperator, "triplets"), (WeightOperator, "residuals")),
}
REST = "rest"


class Clock:
    """Seconds by part.

    Time counts for the innermost part that is running, except that the residual includes the parts within it.
    """

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
    """A clock that runs during the block."""
    clock = Clock(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(WeightOperator, "chebyshev", return_value=None))
        stack.enter_context(mock.patch.object(WeightOperator, "lanczos", return_value=None))
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, clock.wrap(part, getattr(owner, name))))
        clock.since = clock._now()
        yield clock
        clock._charge()


def split(weight: Tensor, rank: int, niter: int | None = None, repeats: int = 3) -> dict[str, float]:
    """Milliseconds by part, in the fastest of several runs after a warm-up."""
    runs = []
    for _ in range(repeats + 1):  # the first run is the warm-up
        with clocked(weight.device.type) as clock:
            pissa_kernels.truncated_svd(weight, rank, niter=niter)
        runs.append({part: seconds * 1e3 for part, seconds in clock.seconds.items()})
    return min(runs[1:], key=lambda run: sum(run.values()))


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, "On a GPU the sum of the parts is an upper bound.")
    parser.add_argument("--suite", choices=SUITES, default="engine", help="suite of cases (default: engine)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default: cpu)")
    parser.add_argument("--only", default="", metavar="REGEX", help="measure only the cases whose name matches REGEX")
    parser.add_argument("--niter", type=int, metavar="N", help="match N rounds instead of the tolerance")
    arguments = parser.parse_args(argv)
    lines = []
    for case in SUITES[arguments.suite].cases:
        if re.search(arguments.only, case.name):
            weight = case.weight(arguments.device)
            parts = split(weight.mT if case.fan_in_fan_out else weight, case.rank, arguments.niter)
            lines.append((case.name, sum(parts.values()), *parts.values()))
    headers = ("case", "total ms", *PARTS, REST)
    print(tabulate(lines, headers, floatfmt=".1f"))
    return 0
