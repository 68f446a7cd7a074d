"""Launch parameters: looked up in the JSON files of launch/, one per device, written by ``python -m bench search``.

A device without a file takes that of its nearest relative, the longest common beginning of their names, and
``default.json`` without one. Of a verb's entries the one counts whose features are nearest, as ratios: the bytes of an
element first, then columns or rank.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "launch"
DEFAULT = "default"
# A name must agree with a file's in this many words to be its relative: "nvidia h100".
RELATED = 2

Entry = dict[str, dict[str, int]]


def slug(name: str) -> str:
    """The file name of a device, from torch's name for it."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


@cache
def table(device_name: str | None) -> dict[str, list[Entry]]:
    """Every verb's entries for a device: ``{"features": {…}, "parameters": {…}}`` each."""
    entries: dict[str, list[Entry]] = read(DEFAULT)
    if device_name is not None:
        words = slug(device_name).split("_")
        files = [path.stem for path in sorted(FOLDER.glob("*.json")) if path.stem != DEFAULT]
        nearest = max(files, key=lambda stem: _common(words, stem.split("_")), default=None)
        if nearest is not None and _common(words, nearest.split("_")) >= RELATED:
            entries = entries | read(nearest)
    return entries


def parameters(verb: str, device: torch.device, **features: int) -> dict[str, int]:
    """Block sizes, warps and stages for a launch.

    Args:
        verb: "transpose_cast", "subtract_lowrank_", "product" or "grouped".
        device: of the weight.
        features: what the choice hangs on, each ≥ 1.
    """
    return _parameters(verb, _name(device), tuple(sorted(features.items())))


@cache
def _parameters(verb: str, device_name: str | None, features: tuple[tuple[str, int], ...]) -> dict[str, int]:
    def distance(entry: Entry) -> tuple[float, float]:
        apart = {name: abs(math.log2(value / entry["features"][name])) for name, value in features}
        return apart.pop("bytes"), sum(apart.values())  # another dtype is another kernel: it counts first

    # said aloud, because Triton is about to change its default: without it a float32 product takes twice the operations
    return min(table(device_name)[verb], key=distance)["parameters"] | {"enable_fp_fusion": True}


def multiprocessors(device: torch.device) -> int:
    """Of the device; 1 for the interpreter's CPU, where splitting work gains nothing."""
    return _multiprocessors(device.index or 0) if device.type == "cuda" else 1


@cache
def _multiprocessors(index: int) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def _name(device: torch.device) -> str | None:
    return _device_name(device.index or 0) if device.type == "cuda" else None


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def read(stem: str) -> dict[str, list[Entry]]:
    """The contents of a file of launch/."""
    contents: dict[str, list[Entry]] = json.loads((FOLDER / f"{stem}.json").read_text())
    return contents


def _common(first: list[str], second: list[str]) -> int:
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
