"""Constants of the cost model for this CPU: one :class:`pissa_kernels.svd.machines.Machine` for each set of kernels.

Products with weights of several sizes and panels of several widths are timed, then products of panels, small operations
and eigenproblems, all with the threads that torch has (``OMP_NUM_THREADS``). Each group is fitted by least squares of
the relative errors. The output is Python: entries of ``MACHINES`` in ``pissa_kernels/svd/machines.py``.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from unittest import mock

import numpy as np
import torch

from pissa_kernels.ops import dispatch, isa

from .. import commands
from ..harness.environment import machine

SIZES = (512, 1024, 2048, 4096)
COLUMNS = (8, 16, 32, 64, 128)
EIGENPROBLEMS = (16, 32, 64, 128, 192, 256, 384, 512, 768)
GRAMS = ((384, 384), (1536, 576), (2048, 1024))
REPEATS = 7


def seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """The shortest of several times of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def fitted(terms: Iterable[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Coefficients ≥ 0 of the sums of terms that are closest to the times, by relative error."""
    rows = np.array([np.array(row) / time for row, time in zip(terms, times, strict=True)])
    kept = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, kept], np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept = [index for index, value in zip(kept, found, strict=True) if value >= 0]
    result = np.zeros(rows.shape[1])
    result[kept] = found
    return [float(value) for value in result]


def product_constants() -> tuple[float, float]:
    """Operations per second in a product of a weight with a panel, and seconds to read one element of the weight."""
    terms, times = [], []
    for n in SIZES:
        weight = torch.randn(n, n).bfloat16()
        normal = dispatch.bind("normal", weight)
        for k in COLUMNS:
            panel = torch.randn(n, k)
            times.append(seconds(functools.partial(normal, weight, panel)))
            terms.append((4 * n * n * k, 2 * n * n))  # two products
    operation, read = fitted(terms, times)
    return 1 / operation, read


def gram_flops() -> float:
    """Operations per second in the Gram matrix of a weight, for sizes at which it is formed."""
    rates = []
    for m, n in GRAMS:
        weight = torch.randn(m, n).bfloat16()
        rates.append(2 * m * n * n / seconds(functools.partial(dispatch.bind("gram", weight), weight)))
    return float(np.median(rates))


def panel_flops() -> float:
    """Operations per second in the projection of a panel against a basis."""
    basis, panel = torch.randn(256, 4096), torch.randn(4096, 32)
    return 4 * 256 * 4096 * 32 / seconds(lambda: torch.addmm(panel, basis.mT, basis @ panel, alpha=-1), 30)


def small_call() -> float:
    """Seconds of a small operation: of a product, a norm and a Cholesky factorization, on average.

    In an iteration it takes about twice as long as in a loop, where its code and its data are in cache.
    """
    X = torch.randn(64, 16)
    gram = X.mT @ X
    functions = (lambda: X.mT @ X, lambda: torch.linalg.vector_norm(X, dim=0), lambda: torch.linalg.cholesky_ex(gram))
    return 2 * sum(seconds(function, 100) for function in functions) / len(functions)


def eigh_constants() -> tuple[float, float, float]:
    """Coefficients (n, n², n³) of the seconds for ``eigh``."""
    times = []
    for n in EIGENPROBLEMS:
        X = torch.randn(n, n)
        times.append(seconds(functools.partial(torch.linalg.eigh, X @ X.mT)))
    linear, square, cube = fitted([(n, n**2, n**3) for n in EIGENPROBLEMS], times)
    return linear, square, cube


def kernels() -> Iterator[str]:
    """Key in ``MACHINES`` of each set of kernels that runs here. While it is out, the verbs are bound to these."""
    with mock.patch.dict(os.environ, {dispatch.VARIABLE: "torch"}):
        yield "cpu"
    if not dispatch.unsupported_reasons("normal", torch.ones(2, 2))["csrc"]:
        for name, reason in isa.unsupported_reasons().items():
            if reason is None:
                # forced, because the generic kernels are not chosen for products
                with isa.using(name), mock.patch.dict(os.environ, {dispatch.VARIABLE: "csrc"}):
                    yield f"cpu {name}"


def main(name: str, argv: Sequence[str]) -> int:
    commands.parser(name).parse_args(argv)
    about = machine("cpu")
    print(f"# {about['cpu']}, {about['cores']} threads, torch {torch.__version__}")
    torch.manual_seed(0)
    flops, call, eigh = panel_flops(), small_call(), eigh_constants()
    for key in kernels():
        (products, read), gram = product_constants(), gram_flops()
        coefficients = ", ".join(f"{value:.1e}" for value in eigh)
        print(
            f'"{key}": Machine(flops={flops:.1e}, products={products:.1e}, gram={gram:.1e}, read={read:.1e}, '
            f"call={call:.1e}, eigh=({coefficients})),",
            flush=True,
        )
    return 0
