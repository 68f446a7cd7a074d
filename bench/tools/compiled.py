"""Compile every GPU kernel for every target, without a GPU, print a table of the results and check them.

Registers, spills and instructions are those of the SASS, or of AMD's assembly; layout conversions those of Triton's
GPU IR. Triton's kernels are compiled with each of the target's launch parameters, for contiguous, aligned tensors, and
must meet their line in :mod:`.gates`; the CUDA files of csrc/ with nvcc if it is on the PATH, and must not spill.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import commands
from ..harness.paths import ROOT
from . import gates, sass
from .variants import Variant, variants

NVIDIA = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)}
AMD = {architecture: GPUTarget("hip", architecture, 64) for architecture in ("gfx942", "gfx950")}
TARGETS = NVIDIA | AMD
CUDA_WARPS = 4  # of csrc's kernels


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
    variant = list(variants(target))[index]
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
        for target in arguments.targets
        for index, variant in enumerate(variants(target))
        if re.search(arguments.only, variant.name)
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
