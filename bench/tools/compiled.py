"""Compile every GPU kernel for every target, without a GPU, and print a table of the results.

Registers, spills and shared memory are those that the assembler reports; 16-byte accesses of global memory are counted
in the PTX, in SASS, or in AMD's assembly. Triton's kernels are compiled with each of the default launch parameters, for
contiguous, aligned tensors; the CUDA files of csrc/ with nvcc if it is on the PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from pissa_kernels.ops.triton.grouped import ELEMENTS_BY_NAME
from pissa_kernels.ops.triton.grouped import kernel as grouped_kernel
from pissa_kernels.ops.triton.launch import DEFAULT, read
from pissa_kernels.ops.triton.product import kernel as product_kernel
from pissa_kernels.ops.triton.subtract_lowrank import kernel as subtract_kernel
from pissa_kernels.ops.triton.transpose_cast import kernel as transpose_kernel

from .. import commands
from ..harness.paths import ROOT

NVIDIA = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)}
AMD = {architecture: GPUTarget("hip", architecture, 64) for architecture in ("gfx942", "gfx950")}
TARGETS = NVIDIA | AMD
BYTES = {2: "bf16", 4: "fp32"}


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


@dataclass(frozen=True)
class Report:
    """Figures of one compiled kernel; -1 where the compiler does not report one."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    seconds: float


def variants() -> Iterator[Variant]:
    """Every kernel with every entry of the default launch parameters."""
    for entry in read(DEFAULT)["transpose_cast"]:
        source, target = {4: ("bf16", "bf16"), 6: ("bf16", "fp32"), 8: ("fp32", "fp32")}[entry["features"]["bytes"]]
        yield _variant(f"transpose_cast {source} {target}", transpose_kernel, entry, source, COLUMN_MAJOR=False,
                       result=f"*{target}", col_stride=1)  # fmt: skip
    for entry in read(DEFAULT)["subtract_lowrank_"]:
        dtype = BYTES[entry["features"]["bytes"]]
        name = f"subtract_lowrank_ {dtype} r{entry['features']['rank']}"
        yield _variant(name, subtract_kernel, entry, dtype, scaling="fp32", ARITHMETIC="bf16",
                       weight_col=1, left_rank=1, right_col=1)  # fmt: skip
    for entry in read(DEFAULT)["product"]:
        dtypes = ("bf16", "fp16") if entry["features"]["bytes"] == 2 else ("fp32",)
        for dtype in dtypes:
            fixed = {"PIECES": 3, "ARITHMETIC": "tf32" if dtype == "fp16" else "bf16", "panel_col": 1}
            columns = entry["features"]["columns"]
            yield _variant(f"matmul {dtype} {columns}", product_kernel, entry, dtype, weight_inner=1, **fixed)
            yield _variant(f"rmatmul {dtype} {columns}", product_kernel, entry, dtype, weight_row=1, **fixed)
    for entry in read(DEFAULT)["grouped"]:
        dtype = BYTES[entry["features"]["bytes"]]
        fixed = {
            "PIECES": 3,
            "ARITHMETIC": "bf16",
            "ALIGNED": True,
            "PANEL_CONTIGUOUS": True,
            "ELEMENT": ELEMENTS_BY_NAME[dtype],
        }
        for verb in ("matmul", "rmatmul"):
            name = f"grouped_{verb} {dtype} {entry['features']['columns']}"
            yield _variant(name, grouped_kernel, entry, dtype, table="*i64", tiles="*i64",
                           INNER_CONTIGUOUS=verb == "matmul", ROW_CONTIGUOUS=verb == "rmatmul", **fixed)  # fmt: skip


def _variant(name: str, kernel: Any, entry: dict[str, dict[str, int]], dtype: str, **given: Any) -> Variant:
    launch = dict(entry["parameters"])
    options = {key: launch.pop(key) for key in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    types = {"source": f"*{dtype}", "weight": f"*{dtype}", "left": "*fp32", "right": "*fp32", "panel": "*fp32"}
    types |= {"result": "*fp32"} | {key: value for key, value in given.items() if key.islower() and value != 1}
    constants = launch | {key: value for key, value in given.items() if key.isupper() or value == 1}
    names = [parameter for parameter in kernel.arg_names if parameter not in constants]
    return Variant(name, kernel, {key: types.get(key, "i32") for key in names}, constants, options)


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """The compiled kernel, for pointers and sizes divisible by 16, as in torch's allocations and models."""
    constants = dict(variant.constants)
    if target.backend == "hip" and constants.get("ARITHMETIC") == "tf32":
        constants["ARITHMETIC"] = "ieee"
    positions = {name: index for index, name in enumerate(variant.kernel.arg_names)}
    specialized = set(variant.types) - {"splits"}
    aligned = [name for name in specialized if variant.types[name].startswith("*") or variant.types[name] == "i32"]
    attributes = {(positions[name],): [["tt.divisibility", 16]] for name in sorted(aligned)}
    signature = {name: variant.types.get(name, "constexpr") for name in variant.kernel.arg_names}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=variant.options)


def report(variant: Variant, target_name: str) -> Report:
    began = time.perf_counter()
    kernel = compiled(variant, TARGETS[target_name])
    seconds = time.perf_counter() - began
    shared = kernel.metadata.shared
    if target_name in AMD:
        text = kernel.asm["amdgcn"]
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text) + _number(r"\.sgpr_spill_count:\s+(\d+)", text)
        loads = len(re.findall(r"(?:global|buffer)_load_dwordx4|(?:global|buffer)_load_b128", text))
        stores = len(re.findall(r"(?:global|buffer)_store_dwordx4|(?:global|buffer)_store_b128", text))
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        return Report(variant.name, target_name, registers, spills, shared, loads, stores, seconds)
    text = kernel.asm["ptx"]
    loads = len(re.findall(r"ld\.global[\w.:]*\.v4\.[bf]32|cp\.async\.cg\.shared\.global[^;]*?, 0x10|ld\.global[\w.:]*\.v8\.b32", text))  # fmt: skip  # noqa: E501
    stores = len(re.findall(r"st\.global[\w.:]*\.v4\.[bf]32|st\.global[\w.:]*\.v8\.b32", text))
    registers, spills = _assembled(text)
    return Report(variant.name, target_name, registers, spills, shared, loads, stores, seconds)


def _assembled(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes of a kernel, from the assembler in Triton's package."""
    architecture = _word(r"\.target (\w+)", ptx)
    assembler = get_ptxas(int(re.sub(r"\D", "", architecture)))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "kernel.ptx"
        path.write_text(ptx)
        command = [assembler.path, "-v", f"--gpu-name={architecture}", str(path)]
        done = subprocess.run([*command, "-o", str(path) + ".o"], capture_output=True, text=True, check=True)
    return _number(r"Used (\d+) registers", done.stderr), _spills(done.stderr)


def cuda_reports(job: tuple[Path, str]) -> list[Report]:
    """The kernels of one file of csrc/cuda, for one target."""
    from torch.utils.cpp_extension import include_paths

    source, target = job
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "kernel.cubin"
        command = ["nvcc", "-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-I{path}" for path in include_paths()]
        command += [f"-arch={target}", "-cubin", "-Xptxas", "-v", str(source), "-o", str(out)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - began
        disassembler = triton.knobs.nvidia.cuobjdump.path  # part of Triton's package
        sass = subprocess.run([disassembler, "-sass", str(out)], capture_output=True, text=True, check=True)
    return list(_cuda_report(source.name, target, done.stderr, sass.stdout, seconds))


def _cuda_report(file: str, target: str, log: str, sass: str, seconds: float) -> Iterator[Report]:
    functions = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        name = _word(r"entry function '(\w+)'", block)
        code = functions.get(name, "")
        yield Report(
            f"{file} {_readable(name)}",
            target,
            _number(r"Used (\d+) registers", block),
            _spills(block),
            _number(r"(\d+) bytes smem", block, missing=0),
            len(re.findall(r"LDG\.E[\w.]*\.128|LDGSTS[\w.]*\.128", code)),
            len(re.findall(r"STG\.E[\w.]*\.128", code)),
            seconds,
        )


def _readable(mangled: str) -> str:
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=False)
    name = done.stdout.strip() or mangled
    return re.sub(r"\(.*", "", name.replace("(anonymous namespace)::", "").replace("void ", "")).split("::")[-1]


def _spills(log: str) -> int:
    stores, loads = (_number(rf"(\d+) bytes spill {what}", log, missing=0) for what in ("stores", "loads"))
    return stores + loads


def _number(pattern: str, text: str, missing: int = -1) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else missing


def _word(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in the compiler's output"
    return found[1]


def _report_job(job: tuple[int, str]) -> Report:
    index, target = job  # kernels cannot be pickled
    return report(list(variants())[index], target)


def main(name: str, argv: Sequence[str]) -> int:
    parser = commands.parser(name, "The exit status is 1 if a kernel spills or does not compile.")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=TARGETS,
        default=list(TARGETS),
        metavar="TARGET",
        help=f"targets (default: {' '.join(TARGETS)})",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="compile only kernels whose name matches REGEX")
    arguments = parser.parse_args(argv)
    jobs = [
        (index, target)
        for index, variant in enumerate(variants())
        if re.search(arguments.only, variant.name)
        for target in arguments.targets
    ]
    files = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not shutil.which("nvcc"):
        files = []
        print("nvcc is not on the PATH: csrc/cuda is not compiled", file=sys.stderr)
    cuda_jobs = [(file, target) for file in files for target in arguments.targets if target in NVIDIA]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        triton_reports, cuda = pool.map(_report_job, jobs), pool.map(cuda_reports, cuda_jobs)
        found = [report for group in cuda for report in group]
        reports = [*triton_reports, *(report for report in found if re.search(arguments.only, report.kernel))]
    headers = ("kernel", "target", "registers", "spilled bytes", "shared bytes", "16-byte loads", "stores", "seconds")
    lines = [tuple(vars(report).values()) for report in reports]
    print(tabulate(lines, headers, floatfmt=".1f"))
    return 1 if any(report.spills for report in reports) else 0
