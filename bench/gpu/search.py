"""Search launch parameters of the Triton kernels for this GPU.

Candidates are tried for each entry of the defaults, on a batch that fills the GPU. Each passes the gate of the step
"smoke" before it is timed. The fastest of each entry goes to a file in ops/triton/launch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from pissa_kernels.ops.triton import compilation, launch

from .. import commands
from ..harness.timing import timed
from .case import BatchedCase
from .dense_cases import Eigh, InverseCholesky
from .kernels import CALLS, SECONDS_OF_RUN, Repeated
from .smoke import body_of
from .weight_cases import Product, Split, Subtraction, SumOfSquares, TransposeCast

SIZE, BATCH = 4096, 16
BYTES = {2: "bf16", 4: "fp32"}
# dtypes by the bytes of both: of a weight and its transpose, of a weight and its factors
PAIRS = {4: ("bf16", "bf16"), 6: ("bf16", "fp32"), 8: ("fp32", "fp32")}
WARPS = (4, 8)
GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "product": {"BLOCK_ROWS": (128, 256), "BLOCK_INNER": (32, 64, 128), "num_warps": WARPS, "num_stages": (2, 3, 4)},
    "product_of_panels": {"BLOCK_ROWS": (64, 128), "BLOCK_COLS": (64, 128), "BLOCK_INNER": (32, 64),
                          "num_warps": WARPS, "num_stages": (2, 3)},
    "inverse_cholesky": {"BLOCK": (16, 32), "ROWS": (32, 64, 128), "num_warps": (1, 2, 4, 8)},
    "eigh.update": {"ROWS": (32, 64, 128), "num_warps": (1, 2, 4)},
    "eigh.diagonalize": {"num_warps": (1, 2, 4, 8, 16)},
    "subtract_lowrank_": {"BLOCK_ROWS": (64, 128), "BLOCK_COLS": (64, 128, 256), "num_warps": WARPS},
    "sum_of_squares": {"BLOCK_ROWS": (4, 8, 16), "BLOCK_COLS": (512, 1024), "num_warps": WARPS},
    "transpose_cast": {"BLOCK_ROWS": (32, 64, 128), "BLOCK_COLS": (64, 128), "num_warps": WARPS},
    "split": {"BLOCK": (1024, 2048, 4096), "num_warps": WARPS},
}  # fmt: skip
# Registers of a thread for accumulators, at most. Products of several pieces have two.
ACCUMULATORS = 128
REPEATS = 5


def candidates(verb: str, features: dict[str, int], default: dict[str, int]) -> Iterator[dict[str, int]]:
    """The default, then its variants with each combination of the verb's grid that fits into registers."""
    yield default
    grid = GRIDS[verb]
    for values in itertools.product(*grid.values()):
        changed = default | dict(zip(grid, values, strict=True))
        if changed != default and _registers(verb, features, changed) <= ACCUMULATORS:
            yield changed


def _registers(verb: str, features: dict[str, int], parameters: dict[str, int]) -> float:
    """Registers of a thread for the accumulators of a product; 0 for other kernels."""
    if not verb.startswith("product"):
        return 0
    columns = parameters["BLOCK_COLS"] + parameters["BLOCK_MORE"]
    count = 1 if features["pieces"] == 1 else 2
    return count * parameters["BLOCK_ROWS"] * columns / (32 * parameters["num_warps"])


def case_of(verb: str, features: dict[str, int], size: int, batch: int) -> BatchedCase:
    """What an entry's parameters are timed on: weights (size, size), or the matrices that such weights lead to."""
    dtype = BYTES.get(features["bytes"], "")
    if verb == "product":
        return Product(size, size, dtype, batch, min(features["columns"], size), features["pieces"])
    if verb == "product_of_panels":
        columns = min(features["columns"], size)
        return Product(size, columns, batch=batch, columns=columns, precision=features["pieces"], kind="change")
    if verb == "inverse_cholesky":
        return InverseCholesky(size, features["size"], batch=batch)
    if verb.startswith("eigh"):
        # one subproblem, or several
        rows = features["rows"] if features.get("sweeps", 1) > 1 else 8 * features["rows"]
        return Eigh(rows, rows, batch=8 * batch)
    if verb == "subtract_lowrank_":
        weight, factor = PAIRS[features["bytes"]]
        return Subtraction(size, size, weight, batch, min(features["rank"], size), factors=factor)
    if verb == "transpose_cast":
        source, target = PAIRS[features["bytes"]]
        return TransposeCast(size, size, source, batch, target=target)
    return Split(size, 256, batch=batch) if verb == "split" else SumOfSquares(size, size, dtype, batch)


@contextlib.contextmanager
def instead(verb: str, parameters: dict[str, int]) -> Iterator[None]:
    """Context in which a verb has other parameters."""
    usual, found = launch._parameters, parameters | {"enable_fp_fusion": True}
    with mock.patch.object(launch, "_parameters", lambda name, *key: found if name == verb else usual(name, *key)):
        yield


@dataclass(frozen=True)
class Search:
    """The search on one device.

    Attributes:
        device: "cuda", or "cpu" where Triton's interpreter runs.
        size: of the weights.
        batch: number of weights.
    """

    device: str
    size: int = SIZE
    batch: int = BATCH

    def best(self, verb: str, entry: launch.Entry) -> dict[str, int]:
        """The fastest correct candidate for one entry.

        Raises:
            RuntimeError: no candidate is correct.
        """
        case, body = case_of(verb, entry["features"], self.size, self.batch), body_of("triton")
        inputs = case.inputs(self.device)
        own = case.errors(inputs, case.call(body_of("torch"), inputs, 1))
        tried = list(candidates(verb, entry["features"], entry["parameters"]))
        self._compile(verb, partial(case.call, body, inputs, 1), tried)
        seconds: dict[str, float] = {}
        for candidate in tried:
            with instead(verb, candidate):
                try:
                    units = case.units(case.errors(inputs, case.call(body, inputs, 1)), own)
                    if not units <= 1:
                        print(f"  {candidate}: error {units:.2g} times what is allowed")
                        continue
                    seconds[json.dumps(candidate)] = self._time(partial(case.call, body, inputs, case.batch))
                except Exception as failure:  # too much shared memory, too few warps
                    print(f"  {candidate}: {type(failure).__name__}")
        if not seconds:
            raise RuntimeError(f"{verb}: no candidate is correct for {entry['features']}")
        fastest = min(seconds, key=seconds.__getitem__)
        first = seconds.get(json.dumps(entry["parameters"]), float("nan"))
        print(f"{verb} {entry['features']}: {seconds[fastest] * 1e6:.1f} µs, the default takes {first * 1e6:.1f}")
        winner: dict[str, int] = json.loads(fastest)
        return winner

    def _compile(self, verb: str, call: Callable[[], object], tried: Sequence[dict[str, int]]) -> None:
        def dry_run() -> None:
            for candidate in tried:
                with instead(verb, candidate):
                    call()

        with contextlib.suppress(Exception):  # the candidate's own call says what is wrong
            compilation.compile_ahead(dry_run, torch.device(self.device))

    def _time(self, call: Callable[[], object]) -> float:
        subject = Repeated(call)
        timed(subject, self.device)
        if self.device == "cuda":
            subject.calls = max(1, min(CALLS, math.ceil(SECONDS_OF_RUN / timed(subject, self.device))))
        return min(timed(subject, self.device) for _ in range(REPEATS)) / subject.calls

    def run(self, path: Path, only: str = "") -> int:
        """Search, and write the file after each entry, in case the search is stopped; the number of entries.

        Args:
            path: the file. Entries that are not searched are those that the device has used so far.
            only: regular expression for "verb {features}".
        """
        before, found, count = launch.table(path.stem), dict[str, list[launch.Entry]](), 0
        for verb in GRIDS:
            entries = [{**entry} for entry in before[verb]]
            for entry in entries:
                if re.search(only, f"{verb} {entry['features']}"):
                    entry["parameters"] = self.best(verb, entry)
                    found[verb] = entries
                    path.write_text(written(found), encoding="utf-8")
                    count += 1
        return count


def written(entries: dict[str, list[launch.Entry]]) -> str:
    """JSON with one line per entry."""
    verbs = (
        f"  {json.dumps(verb)}: [\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in group) + "\n  ]"
        for verb, group in entries.items()
    )
    return "{\n" + ",\n".join(verbs) + "\n}\n"


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, "They go to the architecture's file in pissa_kernels/ops/triton/launch.")
    parser.add_argument("--only", default="", metavar="REGEX", help='search only what matches, as "product .*: 256"')
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"bench {name}: torch finds no CUDA device", file=sys.stderr)
        return 2
    path = launch.FOLDER / f"{launch.architecture(torch.device('cuda', 0))}.json"
    print(f"{Search('cuda').run(path, arguments.only)} entries, written to {path.name}")
    return 0
