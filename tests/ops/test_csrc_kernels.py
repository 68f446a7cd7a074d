"""The CPU kernels alone, without torch: csrc_kernels/ holds them against double precision.

Natively for each instruction set that this CPU has, with checked bounds; for aarch64 with the options of the build, in
an emulator.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
KERNELS, DRIVER = ROOT / "csrc" / "cpu" / "kernels.cpp", ROOT / "tests" / "ops" / "csrc_kernels" / "main.cpp"
PRODUCTS = ("multiply", "multiply_adjoint", "gram", "transform")
NAMES = (*PRODUCTS, "transpose_cast", "subtract_lowrank", "sum_of_squares", "quantize_blocks")
CROSS = "aarch64-linux-gnu-"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    """The constants of setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_driver(folder: Path, compiler: str, instruction_set: str, flags: list[str], link: list[str]) -> Path:
    """Only the kernels get ``flags``, those of the instruction set among them."""
    both = ["-std=c++17", "-Wno-psabi", f"-DPISSA_ISA={instruction_set}", *link]
    run(compiler, *both, *flags, "-c", KERNELS, "-o", folder / "kernels.o")
    run(compiler, *both, "-O1", DRIVER, folder / "kernels.o", "-o", folder / "driver")
    return folder / "driver"


def check(output: str, instruction_set: str) -> None:
    counts = dict(re.findall(rf"^{instruction_set} (\w+): (\d+) elements", output, re.MULTILINE))
    assert set(counts) == set(NAMES)
    assert all(int(count) > 0 for count in counts.values())


def missing_features(flags: list[str]) -> set[str]:
    """Those of the compiler's -m options that this CPU does not have."""
    wanted = {re.sub("[-_.]", "", flag.removeprefix("-m")) for flag in flags if flag.startswith("-m")}
    return wanted - set(Path("/proc/cpuinfo").read_text().replace("_", "").split()) if wanted else set()


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
@pytest.mark.parametrize("instruction_set", ["generic", "avx2", "avx512"])
def test_kernels(instruction_set: str, build: dict[str, Any], tmp_path: Path) -> None:
    if instruction_set not in build["INSTRUCTION_SETS"]:
        pytest.skip(f"{instruction_set} is not built on this architecture")
    flags = build["INSTRUCTION_SETS"][instruction_set]
    if missing := missing_features(flags):
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    link = ["-fsanitize=address", "-fno-omit-frame-pointer"]
    check(run(compile_driver(tmp_path, "g++", instruction_set, [*flags, "-Og"], link)), instruction_set)


@pytest.mark.skipif(shutil.which(f"{CROSS}g++") is None, reason="no cross compiler (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no emulator (Debian: qemu-user)")
def test_kernels_on_arm(build: dict[str, Any], tmp_path: Path) -> None:
    driver = compile_driver(tmp_path, f"{CROSS}g++", "generic", build["FLAGS"], ["-static"])
    assembly = run(f"{CROSS}objdump", "-d", tmp_path / "kernels.o")
    assert len(re.findall(r"fmla\s+v\d+\.4s", assembly)) > 100  # NEON, four floats at a time
    check(run("qemu-aarch64", driver), "generic")
