"""Builds the libraries of csrc/ if PISSA_KERNELS_BUILD is set. The metadata is in pyproject.toml.

    PISSA_KERNELS_BUILD=cpu  pip install --no-build-isolation .    C++ for CPUs
    PISSA_KERNELS_BUILD=cuda pip install --no-build-isolation .    also CUDA C++; needs nvcc, but no GPU
    PISSA_KERNELS_BUILD=0    (or unset)                            nothing: the verbs run in Triton or plain torch

The build needs torch's headers, hence no build isolation. An ordinary `pip install .` is isolated and has no torch, so
nothing is built unless it is asked for; wheels are built with PISSA_KERNELS_BUILD=cpu. A library that cannot be built
is skipped, with the reason: the package works without it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
# The stable ABI as of torch 2.10, so that a library built with a newer torch loads in 2.10.
DEFINES = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
X86 = platform.machine() in ("x86_64", "AMD64")
# kernels.cpp is compiled for each; the library chooses at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
INSTRUCTION_SETS = {"generic": [], **({"avx2": AVX2, "avx512": AVX512} if X86 else {})}
# In pissa_kernels/ops/csrc.py, too, which refuses devices that the library has neither code nor PTX for.
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
CUDA_PTX = "90"


def log(message: str) -> None:
    print(f"pissa_kernels: {message}", flush=True)


def requested_devices() -> list[str]:
    """Devices to build for, of those that PISSA_KERNELS_BUILD names; logs what is built or why not."""
    choice = os.environ.get("PISSA_KERNELS_BUILD", "0").lower()
    if choice not in ("0", "cpu", "cuda"):
        raise SystemExit(f"pissa_kernels: PISSA_KERNELS_BUILD must be 0, cpu or cuda, got {choice!r}")
    if choice == "0":
        log("csrc is not built (set PISSA_KERNELS_BUILD=cpu or cuda to build it)")
        return []
    devices = ["cpu", "cuda"] if choice == "cuda" else ["cpu"]
    possible = [device for device in devices if not obstacle(device)]
    for device in devices:
        log(f"csrc for {device}: {obstacle(device) or 'will be built'}")
    return possible if "cpu" in possible else []


def obstacle(device: str) -> str | None:
    """Why csrc cannot be built for ``device``, or None."""
    try:
        import torch
    except ImportError:
        return "skipped, torch cannot be imported (install it, then use pip install --no-build-isolation)"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"skipped, torch {torch.__version__} is older than 2.10"
    if not shutil.which(os.environ.get("CXX", "c++")):
        return "skipped, no C++ compiler was found (CXX selects one)"
    if device == "cuda" and not shutil.which("nvcc"):
        return "skipped, nvcc is not on the PATH"
    if device == "cuda" and torch.version.cuda is None:
        return f"skipped, torch {torch.__version__} is a build without CUDA"
    return None


class BuildLibraries(build_ext):
    """Builds plain shared libraries. Torch loads them, not Python, so their names have no Python version."""

    def get_ext_filename(self, ext_name: str) -> str:
        return ext_name.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        device = ext.name.rpartition("_")[2]
        self.include_dirs = include_paths(device_type=device)
        objects = self.cuda_objects() if device == "cuda" else self.cpu_objects()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # linked by the compilers themselves, because Python's link command may have options of another compiler. nvcc
        # links the CUDA runtime statically, so that no version of it need be installed.
        libraries = [f"-L{path}" for path in library_paths(device_type=device)]
        # before torch's libraries, which export some functions of libstdc++ as well, without versions
        libraries += ["-lstdc++"] if platform.system() == "Linux" else []
        libraries += ["-lc10", "-ltorch_cpu"]
        libraries += ["-ltorch_cuda"] if device == "cuda" else []
        linker = "nvcc" if device == "cuda" else None
        self.run_compiler([*objects, "-shared", "-o", str(target), *libraries], linker)
        log(f"built {target.name}, {target.stat().st_size >> 10} KiB")

    def cpu_objects(self) -> list[str]:
        flags = [*FLAGS, *(["-DPISSA_X86"] if X86 else [])]
        steps = ("gram_schmidt", "orthonormalize", "lanczos", "chebyshev", "ritz")
        sources = [
            "registration.cpp",
            "cpu/isa.cpp",
            "cpu/self_check.cpp",
            "cpu/verbs.cpp",
            "cpu/products.cpp",
            "cpu/quantize.cpp",
        ]
        sources += [f"cpu/{name}.cpp" for name in steps]
        sources += ["cpu/amx_products.cpp"] if X86 else []
        objects = [self.compile(CSRC / name, flags) for name in sources]
        tiles = ("cpu/amx.cpp", "cpu/amx_gram.cpp", "cpu/amx_subtract.cpp") if X86 else ()
        objects += [self.compile(CSRC / name, [*flags, *AMX]) for name in tiles]
        for name, options in INSTRUCTION_SETS.items():
            body = [*flags, *options, f"-DPISSA_ISA={name}"]
            objects.append(self.compile(CSRC / "cpu" / "kernels.cpp", body, suffix=name))
        return objects

    def cuda_objects(self) -> list[str]:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
        targets.append(f"-gencode=arch=compute_{CUDA_PTX},code=compute_{CUDA_PTX}")  # for newer architectures
        flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", *targets]
        return [self.compile(source, flags, compiler="nvcc") for source in sorted((CSRC / "cuda").glob("*.cu"))]

    def compile(self, source: Path, flags: list[str], suffix: str = "", compiler: str | None = None) -> str:
        target = Path(self.build_temp) / source.with_suffix(f".{suffix}.o" if suffix else ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        defines = [f"-D{name}={value}" for name, value in DEFINES]
        includes = [f"-I{path}" for path in self.include_dirs]
        self.run_compiler([*flags, *defines, *includes, "-c", str(source), "-o", str(target)], compiler)
        return str(target)

    def run_compiler(self, arguments: list[str], compiler: str | None = None) -> None:
        subprocess.run([compiler or os.environ.get("CXX", "c++"), *arguments], check=True)


class TagWheel(bdist_wheel):
    """Tags a wheel with libraries py3-none-PLATFORM, and one without them py3-none-any.

    The libraries call nothing of Python, so that they need no version of it. An abi3 tag would promise an extension
    module for CPython alone.
    """

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"pissa_kernels.ops._csrc_{device}", sources=[]) for device in requested_devices()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": TagWheel},
)
