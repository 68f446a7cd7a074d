"""Where a row was measured: enough to compare rows, nothing that identifies a host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import pissa_kernels

from .paths import ROOT
from .rows import Row

PACKAGES = ("torch", "peft", "transformers", "triton", "bitsandbytes")


def about(device: str) -> Row:
    """The fields with which every row ends: machine, versions, commit and date."""
    return {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def machine(device: str) -> dict[str, str | int | float | None]:
    """CPU model, number of torch's threads, load average of the last minute, RAM in GiB; GPU, its driver, CUDA."""
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
        "driver": _driver() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of :data:`PACKAGES`; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "pissa_kernels": pissa_kernels.__version__}
    return found | {package: _version(package) for package in PACKAGES}


def commit() -> str | None:
    """Short hash of HEAD, with "-dirty" if the working tree differs from it outside of bench/results."""
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


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None
