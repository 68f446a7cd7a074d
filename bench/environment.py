"""What a row says about where it was measured: enough to compare, nothing that identifies a host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import pissa_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "peft", "transformers", "triton")


def machine(device: str) -> dict[str, str | int | float | None]:
    """CPU model, cores that torch uses, load (processes that run or wait, last minute), RAM in GiB, the GPU's name."""
    try:
        ram = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        ram = None
    return {
        "cpu": _cpu_model(),
        "cores": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "ram_gib": ram,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and what it is measured against; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "pissa_kernels": pissa_kernels.__version__}
    return found | {package: _version(package) for package in PACKAGES}


def commit() -> str | None:
    """Short hash of HEAD, with "-dirty" where the tree differs from it; rows just written do not count."""
    head = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return head and head.strip() + ("-dirty" if changes else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
