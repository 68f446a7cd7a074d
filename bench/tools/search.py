"""Search launch parameters of the Triton kernels for this GPU and write them to ops/triton/launch.

About a dozen candidates are tried for each entry of the defaults. Each is compared with the reference verb before it is
timed, on copies of the weight. The fastest of each entry goes to a file with the device's name.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pissa_kernels import ops
from pissa_kernels.ops.triton import launch

from .. import commands
from ..harness.poison import poisoned
from ..harness.timing import timed
from ..kernels.cases import forced
from ..kernels.run import VerbSubject

SHAPE = (4096, 4096)
DTYPES = {2: torch.bfloat16, 4: torch.float32}
# dtypes by the bytes of both: of a weight and its transpose, of a weight and its factors
PAIRS = {4: (torch.bfloat16, torch.bfloat16), 6: (torch.bfloat16, torch.float32), 8: (torch.float32,) * 2}
GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "transpose_cast": {"BLOCK_ROWS": (32, 64, 128), "BLOCK_COLS": (64, 128), "num_warps": (4, 8)},
    "subtract_lowrank_": {"BLOCK_ROWS": (32, 64, 128), "BLOCK_COLS": (64, 128), "num_warps": (4, 8)},
    "sum_of_squares": {"BLOCK_ROWS": (4, 8, 16), "BLOCK_COLS": (512, 1024), "num_warps": (4, 8)},
    "product": {"BLOCK_INNER": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
}
# Largest error relative to the reference verb's: tensor cores round differently.
LIMIT = 2.0
# Errors of products of fewer pieces, relative to the product.
ROUNDOFF = {1: 2.0**-9, 2: 2.0**-17}
REPEATS = 5


def candidates(verb: str, default: dict[str, int]) -> Iterator[dict[str, int]]:
    """The default, then its variants with each combination of the verb's grid."""
    yield default
    grid = GRIDS[verb]
    for values in itertools.product(*grid.values()):
        changed = default | dict(zip(grid, values, strict=True))
        if changed != default:
            yield changed


def call(verb: str, features: dict[str, int], device: str) -> tuple[Tensor, Callable[[Tensor], Any], Tensor]:
    """A weight, a call of the verb on a weight, and its result in float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    if verb == "transpose_cast":
        source, target = PAIRS[features["bytes"]]
        weight = randn(*SHAPE).to(source)
        return weight, lambda W: ops.transpose_cast(W, target), weight.double().mT
    if verb == "sum_of_squares":
        weight = randn(1, *SHAPE).to(DTYPES[features["bytes"]])
        return weight, ops.sum_of_squares, weight.double().square().sum((1, 2))
    if verb == "subtract_lowrank_":
        dtype, factor = PAIRS[features["bytes"]]
        weight = randn(*SHAPE).to(dtype)
        B, A = randn(SHAPE[0], features["rank"]).to(factor), randn(features["rank"], SHAPE[1]).to(factor)

        def subtract(W: Tensor) -> Any:
            # only Triton has bodies for 16-bit factors, which the public verb does not take
            factors = (B, A) if ops.dispatch.select(verb, W) == "triton" else (B.float(), A.float())
            return ops.dispatch.bind(verb, W)(W, *factors, 1.0)

        return weight, subtract, weight.double() - B.double() @ A.double()
    weight = randn(*SHAPE).to(DTYPES[features["bytes"]])
    X = randn(SHAPE[1], features["columns"])
    return weight, lambda W: ops.matmul(W, X, pieces=features["pieces"]), weight.double() @ X.double()


def _error(run: Callable[[Tensor], Any], weight: Tensor, exact: Tensor) -> float:
    with poisoned():
        return float((run(weight.clone()).double() - exact).norm())


def _instead(verb: str, parameters: dict[str, int]) -> Callable[..., dict[str, int]]:
    """``launch._parameters`` with other parameters for one verb: a product also launches the split of its panel."""
    usual = launch._parameters
    return lambda name, *features: parameters if name == verb else usual(name, *features)


def best(verb: str, entry: launch.Entry, device: str) -> dict[str, int]:
    """The fastest correct candidate for one entry."""
    weight, run, exact = call(verb, entry["features"], device)
    with mock.patch.object(ops.dispatch, "select", return_value="torch"):
        own = _error(run, weight, exact) + ROUNDOFF.get(entry["features"].get("pieces", 3), 0.0) * float(exact.norm())
    seconds: dict[str, float] = {}
    with forced("triton"):
        for candidate in candidates(verb, entry["parameters"]):
            parameters = candidate | {"enable_fp_fusion": True}
            with mock.patch.object(launch, "_parameters", _instead(verb, parameters)):
                try:
                    error = _error(run, weight, exact)
                except Exception as failure:  # too much shared memory, too few warps
                    print(f"  {candidate}: {type(failure).__name__}")
                    continue
                if not error <= LIMIT * own:  # also rejects NaN
                    print(f"  {candidate}: wrong, error {error:.3g} against {own:.3g}")
                    continue
                subject = VerbSubject(run, weight, inplace=verb == "subtract_lowrank_")
                timed(subject, device)
                seconds[json.dumps(candidate)] = min(timed(subject, device) for _ in range(REPEATS)) / subject.launches
    if not seconds:
        raise RuntimeError(f"{verb}: no candidate is correct for {entry['features']}")
    fastest = min(seconds, key=seconds.__getitem__)
    first = seconds.get(json.dumps(entry["parameters"]), float("nan"))
    print(f"{verb} {entry['features']}: {seconds[fastest] * 1e6:.1f} µs, the default takes {first * 1e6:.1f}")
    winner: dict[str, int] = json.loads(fastest)
    return winner


def search(device: str) -> dict[str, list[launch.Entry]]:
    """The best entries of every verb that has a grid."""
    found: dict[str, list[launch.Entry]] = {}
    for verb in GRIDS:
        found[verb] = [
            {"features": entry["features"], "parameters": best(verb, entry, device)}
            for entry in launch.read(launch.DEFAULT)[verb]
        ]
    return found


def written(entries: dict[str, list[launch.Entry]]) -> str:
    """JSON with one line per entry."""
    verbs = (
        f"  {json.dumps(verb)}: [\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in group) + "\n  ]"
        for verb, group in entries.items()
    )
    return "{\n" + ",\n".join(verbs) + "\n}\n"


def main(name: str, argv: Sequence[str]) -> int:
    commands.parser(name, "They are written to pissa_kernels/ops/triton/launch.").parse_args(argv)
    if not torch.cuda.is_available():
        print(f"bench {name}: torch finds no CUDA device", file=sys.stderr)
        return 2
    path = launch.FOLDER / f"{launch.slug(torch.cuda.get_device_name())}.json"
    path.write_text(written(search("cuda")))
    print(f"written to {path.name}")
    return 0
