"""Mounts for the time of a test, where the system allows them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


class BindMounts:
    """Context manager that unmounts at its end what :meth:`add` has mounted."""

    def __init__(self) -> None:
        self._points: list[Path] = []

    def __enter__(self) -> BindMounts:
        return self

    def __exit__(self, *exception: object) -> None:
        for point in reversed(self._points):
            subprocess.run(["umount", point], check=True)

    def add(self, folder: Path, point: Path, *options: str) -> None:
        """Mount a folder at a second place with ``mount --bind``, or skip the test."""
        self._mount(point, "--bind", *(f"-o{option}" for option in options), folder)

    def add_tmpfs(self, point: Path) -> None:
        """Mount a file system of its own, or skip the test."""
        self._mount(point, "-ttmpfs", "tmpfs")

    def _mount(self, point: Path, *arguments: str | Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("mount needs root")
        point.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *arguments, point], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount does not work here: {done.stderr.strip()}")
        self._points.append(point)
