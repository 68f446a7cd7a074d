"""Triton's kernels with their launch parameters and compile-time constants, for :mod:`.compiled`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pissa_kernels.ops.triton.cholesky import inverse_cholesky_kernel
from pissa_kernels.ops.triton.elements import ELEMENTS
from pissa_kernels.ops.triton.jacobi import update
from pissa_kernels.ops.triton.launch import Entry, table
from pissa_kernels.ops.triton.product import MASKED_COLUMNS, product_kernel
from pissa_kernels.ops.triton.split import split_kernel
from pissa_kernels.ops.triton.subproblem import diagonalize
from pissa_kernels.ops.triton.subtract_lowrank import subtract_lowrank_kernel
from pissa_kernels.ops.triton.sum_of_squares import BLOCK_SUMS, add_sums, sum_of_squares_kernel
from pissa_kernels.ops.triton.transpose_cast import transpose_cast_kernel

BYTES = {2: "bf16", 4: "fp32"}
BY_NAME = {element.name: element for element in ELEMENTS.values()}
# dtypes by the bytes of both: of a weight and its transpose, of a weight and its factors
PAIRS = {4: ("bf16", "bf16"), 6: ("bf16", "fp32"), 8: ("fp32", "fp32")}
# types of the arguments of the small dense problems
SMALL_DENSE = dict.fromkeys(("gram", "change", "diagonal", "matrices", "vectors", "turns", "norms"), "*fp32")
SMALL_DENSE |= {"busy": "*i32", "unfinished": "*i32", "shift": "fp32", "tolerance": "fp32"}


@dataclass(frozen=True)
class Variant:
    """A kernel and its compile-time parameters.

    Attributes:
        name: name in the table.
        kernel: Triton function.
        types: types of the arguments that are not in ``constants``, by name.
        constants: values of the constexpr arguments and of the strides that are 1.
        options: numbers of warps and stages.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def variants(architecture: str | None = None) -> Iterator[Variant]:
    """Every kernel with every entry of an architecture's launch parameters, by default those of most of them."""
    entries = table(architecture)
    for entry in entries["transpose_cast"]:
        source, result = PAIRS[entry["features"]["bytes"]]
        yield _variant(f"transpose_cast {source} {result}", transpose_cast_kernel, entry, source, COLUMN_MAJOR=False,
                       result=f"*{result}", col_stride=1)  # fmt: skip
    for entry in entries["subtract_lowrank_"]:
        dtype, factor = PAIRS[entry["features"]["bytes"]]
        fixed = {"scaling": "fp32", "left": f"*{factor}", "right": f"*{factor}", "weight": "*i64", "weight_col": 1,
                 "ELEMENT": BY_NAME[dtype], "ALIGNED": True, "EQUAL": True, "ARITHMETIC": "bf16"}  # fmt: skip
        name = f"subtract_lowrank_ {dtype} {factor} r{entry['features']['rank']}"
        yield _variant(name, subtract_lowrank_kernel, entry, dtype, left_rank=1, right_col=1, **fixed)
        yield _variant(f"{name} transposed", subtract_lowrank_kernel, entry, dtype, left_row=1, right_rank=1, **fixed)
    for entry in entries["sum_of_squares"]:
        dtype = BYTES[entry["features"]["bytes"]]
        yield _variant(f"sum_of_squares {dtype}", sum_of_squares_kernel, entry, dtype, weight="*i64", sums="*fp64",
                       weight_col=1, ELEMENT=BY_NAME[dtype])  # fmt: skip
    alone = {"parameters": {"num_warps": 4, "num_stages": 1}}
    yield _variant("sum_of_squares sums", add_sums, alone, "", sums="*fp64", result="*fp64", BLOCK=BLOCK_SUMS)
    for entry in entries["split"]:
        yield _variant("split", split_kernel, entry, "bf16", values="*fp32", pieces="*bf16", PIECES=2)
    for entry in entries["inverse_cholesky"]:
        yield _variant("inverse_cholesky", inverse_cholesky_kernel, entry, "fp32", **SMALL_DENSE)
    for entry in entries["eigh.diagonalize"]:
        rows, sweeps = entry["features"]["rows"], entry["features"]["sweeps"]
        name = f"eigh.diagonalize {rows} {sweeps}"
        yield _variant(name, diagonalize, entry, "fp32", SIZE=rows, LIMIT=sweeps, **SMALL_DENSE)
    for entry in entries["eigh.update"]:
        rows = entry["features"]["rows"]
        yield _variant(f"eigh.update {rows}", update, entry, "fp32", SIZE=rows, **SMALL_DENSE)
    yield from _products(entries["product"])
    yield from _products_of_panels(entries["product_of_panels"])


def _products(entries: list[Entry]) -> Iterator[Variant]:
    """Products of weights by panels, with the recurrence and every output."""
    update = {"alpha": "*fp32", "current": "*fp32", "previous": "*fp32", "beta": "fp32", "gamma": "fp32"}
    weight = {"left": "*i64", "values": "*fp32", "ALIGNED": True, "LEFT_PIECES": False} | update
    orders = {"matmul": "left_inner", "rmatmul": "left_row"}
    tiles = {json.dumps([entry["parameters"], entry["features"]["pieces"]]): entry for entry in reversed(entries)}
    for entry, whole, (verb, contiguous) in itertools.product(reversed(tiles.values()), (True, False), orders.items()):
        columns, precision = entry["features"]["columns"], entry["features"]["pieces"]
        if not whole and columns > MASKED_COLUMNS:
            continue
        fixed = {"WHOLE": whole, "PIECES": 2, contiguous: 1}
        masked = "" if whole else " masked"
        if entry["features"]["bytes"] == 2:
            yield _variant(f"{verb} bf16 {columns} x{precision}{masked}", product_kernel, entry, "bf16", right="*bf16",
                           pieces="*bf16", ELEMENT=BY_NAME["bf16"], PRECISION=precision, ARITHMETIC="bf16",
                           **fixed, **weight)  # fmt: skip
            continue
        fixed |= {"PRECISION": 1}
        for arithmetic in ("tf32", "tf32x3"):
            for dtype in ("fp16", "fp32"):
                name = f"{verb} {dtype} {columns} {arithmetic}{masked}"
                yield _variant(name, product_kernel, entry, dtype, pieces="*bf16", ELEMENT=BY_NAME[dtype],
                               ARITHMETIC=arithmetic, **fixed, **weight)  # fmt: skip


def _products_of_panels(entries: list[Entry]) -> Iterator[Variant]:
    """Gram matrices, and products of panels by small matrices, whose results are pieces."""
    none: dict[str, Any] = {"alpha": None, "current": None, "previous": None, "beta": 0.0, "gamma": 0.0}
    fixed = {"left": "*bf16", "right": "*bf16", "values": "*fp32", "pieces": "*bf16", "ELEMENT": None, "ALIGNED": False,
             "LEFT_PIECES": True, "ARITHMETIC": "bf16", "PIECES": 3}  # fmt: skip
    tiles = {json.dumps(entry["parameters"]): entry for entry in reversed(entries)}
    for entry, whole in itertools.product(reversed(tiles.values()), (True, False)):
        columns, precision = entry["features"]["columns"], entry["features"]["pieces"]
        for name, contiguous in (("gram", "left_row"), ("change", "left_inner")):
            yield _variant(f"{name} {columns} x{precision}{'' if whole else ' masked'}", product_kernel, entry, "bf16",
                           WHOLE=whole, PRECISION=precision, **{contiguous: 1}, **none, **fixed)  # fmt: skip


def _variant(name: str, kernel: Any, entry: dict[str, dict[str, int]], dtype: str, **given: Any) -> Variant:
    launch = dict(entry["parameters"])
    options = {key: launch.pop(key) for key in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    types = {"source": f"*{dtype}", "weight": f"*{dtype}", "left": "*fp32", "right": "*fp32", "panel": "*fp32"}
    given_types = {key: value for key, value in given.items() if key.islower() and isinstance(value, str)}
    types |= {"result": "*fp32"} | given_types
    constants = launch | {key: value for key, value in given.items() if key not in given_types}
    names = [parameter for parameter in kernel.arg_names if parameter not in constants]
    return Variant(name, kernel, {key: types.get(key, "i32") for key in names}, constants, options)
