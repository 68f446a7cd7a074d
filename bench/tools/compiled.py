"""Compile every GPU kernel for every target, without a GPU, print a table of the results and check them.

Registers, spills and instructions are those of the SASS, or of AMD's assembly; layout conversions those of Triton's
GPU IR. Triton's kernels are compiled with each of the default launch parameters, for contiguous, aligned tensors, and
must meet their line in :mod:`.gates`; the CUDA files of csrc/ with nvcc if it is on the PATH, and must not spill.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pissa_kernels.ops.triton.cholesky import kernel as cholesky_kernel
from pissa_kernels.ops.triton.jacobi import update
from pissa_kernels.ops.triton.launch import DEFAULT, read
from pissa_kernels.ops.triton.product import kernel as product_kernel
from pissa_kernels.ops.triton.split import kernel as split_kernel
from pissa_kernels.ops.triton.subproblem import diagonalize
from pissa_kernels.ops.triton.subtract_lowrank import kernel as subtract_kernel
from pissa_kernels.ops.triton.sum_of_squares import BLOCK_SUMS
from pissa_kernels.ops.triton.sum_of_squares import add as add_kernel
from pissa_kernels.ops.triton.sum_of_squares import kernel as squares_kernel
from pissa_kernels.ops.triton.transpose_cast import kernel as transpose_kernel

from .. import commands
from ..harness.paths import ROOT
from . import gates, sass

NVIDIA = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)}
AMD = {architecture: GPUTarget("hip", architecture, 64) for architecture in ("gfx942", "gfx950")}
TARGETS = NVIDIA | AMD
BYTES = {2: "bf16", 4: "fp32"}
# dtypes by the bytes of both: of a weight and its transpose, of a weight and its factors
PAIRS = {4: ("bf16", "bf16"), 6: ("bf16", "fp32"), 8: ("fp32", "fp32")}
CUDA_WARPS = 4  # of csrc's kernels
# Types of the arguments of the small dense problems.
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


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures of one compiled kernel, columns of the table. MMA instructions, conversions and barriers are in loops."""

    kernel: str = field(kw_only=False)
    target: str = field(kw_only=False)
    registers: int
    spills: int
    shared_bytes: int
    mma: int | None = None
    warpgroup_mma: int | None = None
    conversions: int
    barriers: int | None = None
    wide_loads: int
    wide_stores: int
    blocks: int | None = None
    seconds: float


HEADERS = (
    "kernel",
    "target",
    "registers",
    "spilled bytes",
    "shared bytes",
    "MMA",
    "of warpgroups",
    "conversions",
    "barriers",
    "16-byte loads",
    "stores",
    "blocks per SM",
    "seconds",
)


def variants() -> Iterator[Variant]:
    """Every kernel with every entry of the default launch parameters."""
    for entry in read(DEFAULT)["transpose_cast"]:
        source, target = PAIRS[entry["features"]["bytes"]]
        yield _variant(f"transpose_cast {source} {target}", transpose_kernel, entry, source, COLUMN_MAJOR=False,
                       result=f"*{target}", col_stride=1)  # fmt: skip
    for entry in read(DEFAULT)["subtract_lowrank_"]:
        dtype, factor = PAIRS[entry["features"]["bytes"]]
        fixed = {"scaling": "fp32", "left": f"*{factor}", "right": f"*{factor}", "weight": "*i64", "weight_col": 1,
                 "ELEMENT": ELEMENTS_BY_NAME[dtype], "ALIGNED": True, "EQUAL": True, "ARITHMETIC": "bf16"}  # fmt: skip
        name = f"subtract_lowrank_ {dtype} {factor} r{entry['features']['rank']}"
        yield _variant(name, subtract_kernel, entry, dtype, left_rank=1, right_col=1, **fixed)
        yield _variant(f"{name} transposed", subtract_kernel, entry, dtype, left_row=1, right_rank=1, **fixed)
    for entry in read(DEFAULT)["sum_of_squares"]:
        dtype = BYTES[entry["features"]["bytes"]]
        yield _variant(f"sum_of_squares {dtype}", squares_kernel, entry, dtype, weight="*i64", sums="*fp64",
                       weight_col=1, ELEMENT=ELEMENTS_BY_NAME[dtype])  # fmt: skip
    alone = {"parameters": {"num_warps": 4, "num_stages": 1}}
    yield _variant("sum_of_squares sums", add_kernel, alone, "", sums="*fp64", result="*fp64", BLOCK=BLOCK_SUMS)
    for entry in read(DEFAULT)["split"]:
        yield _variant("split", split_kernel, entry, "bf16", values="*fp32", pieces="*bf16", PIECES=2)
    for entry in read(DEFAULT)["inverse_cholesky"]:
        yield _variant("inverse_cholesky", cholesky_kernel, entry, "fp32", **SMALL_DENSE)
    for entry in read(DEFAULT)["eigh.diagonalize"]:
        rows, sweeps = entry["features"]["rows"], entry["features"]["sweeps"]
        name = f"eigh.diagonalize {rows} {sweeps}"
        yield _variant(name, diagonalize, entry, "fp32", SIZE=rows, LIMIT=sweeps, **SMALL_DENSE)
    for entry in read(DEFAULT)["eigh.update"]:
        rows = entry["features"]["rows"]
        yield _variant(f"eigh.update {rows}", update, entry, "fp32", SIZE=rows, **SMALL_DENSE)
    yield from _products()


def _products() -> Iterator[Variant]:
    """Products of weights by panels, with the recurrence and every output, and of float32 matrices, with neither."""
    update = {"alpha": "*fp32", "current": "*fp32", "previous": "*fp32", "beta": "fp32", "gamma": "fp32"}
    none: dict[str, Any] = {"alpha": None, "current": None, "previous": None, "beta": 0.0, "gamma": 0.0}
    orders = {"matmul": "left_inner", "rmatmul": "left_row"}
    entries = {json.dumps([entry["parameters"], entry["features"]["pieces"]]): entry
               for entry in reversed(read(DEFAULT)["product"])}  # fmt: skip
    for entry, (verb, contiguous) in itertools.product(reversed(entries.values()), orders.items()):
        columns, precision = entry["features"]["columns"], entry["features"]["pieces"]
        if entry["features"]["bytes"] == 2:
            for pieces in (precision,) if precision == 1 else (2, 3):
                yield _variant(f"{verb} bf16 {columns} x{pieces}", product_kernel, entry, "bf16", left="*i64",
                               right="*bf16", values="*fp32", pieces="*bf16", ELEMENT=tl.bfloat16, ALIGNED=True,
                               WHOLE=columns != 128, PRECISION=pieces, PIECES=2, ARITHMETIC="bf16",
                               **{contiguous: 1}, **update)  # fmt: skip
            continue
        yield _variant(f"{verb} fp16 {columns}", product_kernel, entry, "fp16", left="*i64", values="*fp32",
                       pieces=None, ELEMENT=tl.float16, ALIGNED=True, WHOLE=False, PRECISION=1, PIECES=0,
                       ARITHMETIC="tf32x3", **{contiguous: 1}, **update)  # fmt: skip
        for arithmetic in ("tf32", "tf32x3"):
            yield _variant(f"{verb} fp32 {columns} {arithmetic}", product_kernel, entry, "fp32", left="*fp32",
                           values="*fp32", pieces="*bf16", ELEMENT=None, ALIGNED=False, WHOLE=True, PRECISION=1,
                           PIECES=2, ARITHMETIC=arithmetic, **{contiguous: 1}, **none)  # fmt: skip


def _variant(name: str, kernel: Any, entry: dict[str, dict[str, int]], dtype: str, **given: Any) -> Variant:
    launch = dict(entry["parameters"])
    options = {key: launch.pop(key) for key in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    types = {"source": f"*{dtype}", "weight": f"*{dtype}", "left": "*fp32", "right": "*fp32", "panel": "*fp32"}
    given_types = {key: value for key, value in given.items() if key.islower() and isinstance(value, str)}
    types |= {"result": "*fp32"} | given_types
    constants = launch | {key: value for key, value in given.items() if key not in given_types}
    names = [parameter for parameter in kernel.arg_names if parameter not in constants]
    return Variant(name, kernel, {key: types.get(key, "i32") for key in names}, constants, options)


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """The compiled kernel, for pointers and sizes divisible by 16, as in torch's allocations and models."""
    constants = dict(variant.constants)
    if target.backend == "hip" and constants.get("ARITHMETIC") in ("tf32", "tf32x3"):
        constants["ARITHMETIC"] = "ieee"
    positions = {name: index for index, name in enumerate(variant.kernel.arg_names)}
    unspecialized = {parameter.name for parameter in variant.kernel.params if parameter.do_not_specialize}
    specialized = set(variant.types) - unspecialized
    aligned = [name for name in specialized if variant.types[name].startswith("*") or variant.types[name] == "i32"]
    attributes = {(positions[name],): [["tt.divisibility", 16]] for name in sorted(aligned)}
    signature = {name: variant.types.get(name, "constexpr") for name in variant.kernel.arg_names}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=variant.options)


def report(variant: Variant, target: str) -> Report:
    began = time.perf_counter()
    kernel = compiled(variant, TARGETS[target])
    seconds = time.perf_counter() - began
    conversions = sass.looped_conversions(kernel.asm["ttgir"])
    shared = kernel.metadata.shared
    if target in AMD:
        text = kernel.asm["amdgcn"]
        return Report(
            variant.name,
            target,
            registers=_number(r"\.vgpr_count:\s+(\d+)", text),
            spills=sum(_number(rf"\.{kind}_spill_count:\s+(\d+)", text) for kind in ("vgpr", "sgpr")),
            shared_bytes=shared,
            conversions=conversions,
            wide_loads=len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", text)),
            wide_stores=len(re.findall(r"(?:global|buffer)_store_(?:dwordx4|b128)", text)),
            seconds=seconds,
        )
    with tempfile.TemporaryDirectory() as temporary:
        cubin = Path(temporary) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        ((_, code),) = sass.kernels(cubin)
    return _report(variant.name, target, code, shared, variant.options["num_warps"], conversions, seconds)


def _report(
    name: str, target: str, code: sass.Code, shared: int, warps: int, conversions: int, seconds: float
) -> Report:
    return Report(
        name,
        target,
        registers=code.registers,
        spills=code.stack_bytes,
        shared_bytes=shared,
        mma=code.mma,
        warpgroup_mma=code.warpgroup_mma,
        conversions=conversions,
        barriers=code.barriers,
        wide_loads=code.wide_loads,
        wide_stores=code.wide_stores,
        blocks=sass.blocks_per_multiprocessor(target, code.registers, shared, warps),
        seconds=seconds,
    )


def cuda_reports(job: tuple[Path, str]) -> list[Report]:
    """The kernels of one file of csrc/cuda, for one target."""
    from torch.utils.cpp_extension import include_paths

    source, target = job
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "kernel.cubin"
        command = ["nvcc", "-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-I{path}" for path in include_paths()]
        began = time.perf_counter()
        subprocess.run([*command, f"-arch={target}", "-cubin", str(source), "-o", str(out)], check=True)
        seconds = time.perf_counter() - began
        return [
            _report(f"{source.name} {_readable(name)}", target, code, code.shared_bytes, CUDA_WARPS, 0, seconds)
            for name, code in sass.kernels(out)
        ]


def _readable(mangled: str) -> str:
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=False)
    name = done.stdout.strip() or mangled
    return re.sub(r"\(.*", "", name.replace("(anonymous namespace)::", "").replace("void ", "")).split("::")[-1]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in the compiler's output"
    return int(found[1])


def _report_job(job: tuple[int, str]) -> tuple[Report, list[str]]:
    """The report of one kernel, and in what it does not meet its gate."""
    index, target = job  # kernels cannot be pickled
    variant = list(variants())[index]
    found = report(variant, target)
    return found, gates.failures(found, variant.constants, variant.options["num_warps"])


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, "The exit status is 1 if a kernel does not compile, spills, or fails its gate.")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=TARGETS,
        default=list(TARGETS),
        metavar="TARGET",
        help=f"targets (default: {' '.join(TARGETS)})",
    )
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="compile only kernels, and files of csrc, whose name matches REGEX"
    )
    arguments = parser.parse_args(argv)
    jobs = [
        (index, target)
        for index, variant in enumerate(variants())
        if re.search(arguments.only, variant.name)
        for target in arguments.targets
    ]
    files = [file for file in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if re.search(arguments.only, file.name)]
    if not shutil.which("nvcc"):
        files = []
        print("nvcc is not on the PATH: csrc/cuda is not compiled", file=sys.stderr)
    cuda_jobs = [(file, target) for file in files for target in arguments.targets if target in NVIDIA]
    began = time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        triton_reports, cuda = pool.map(_report_job, jobs), pool.map(cuda_reports, cuda_jobs)
        checked = list(triton_reports)
        found = [report for group in cuda for report in group]
    checked.extend((report, ["registers are spilled"] if report.spills else []) for report in found)
    print(tabulate([tuple(vars(report).values()) for report, _ in checked], HEADERS, floatfmt=".1f"))
    print(f"\n{len(checked)} kernels in {time.perf_counter() - began:.0f} s, by triton {triton.__version__}")
    failed = [f"{report.kernel} for {report.target}: {'; '.join(messages)}" for report, messages in checked if messages]
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0
