"""Launch parameters, from the JSON files in launch/, one per device, which ``python -m bench search`` writes.

A device without a file uses the file whose name has the most leading words in common with its own, at least two, over
``default.json``. Among a verb's entries, the one with the nearest features is used: first the bytes of an element, then
the columns or the rank, by their ratio.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "launch"
DEFAULT = "default"
# Leading words that the names of two devices must share for one to use the other's file, as in "nvidia h100".
COMMON_WORDS = 2

Entry = dict[str, dict[str, int]]


def slug(name: str) -> str:
    """The stem of a device's file name, from torch's name for the device."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


@cache
def table(device_name: str | None) -> dict[str, list[Entry]]:
    """The entries of every verb for a device: a list of ``{"features": {…}, "parameters": {…}}``."""
    entries: dict[str, list[Entry]] = read(DEFAULT)
    if device_name is not None:
        words = slug(device_name).split("_")
        files = [path.stem for path in sorted(FOLDER.glob("*.json")) if path.stem != DEFAULT]
        nearest = max(files, key=lambda stem: _common(words, stem.split("_")), default=None)
        if nearest is not None and _common(words, nearest.split("_")) >= COMMON_WORDS:
            entries = entries | read(nearest)
    return entries


def parameters(verb: str, device: torch.device, **features: int) -> dict[str, int]:
    """Block sizes, warps and stages for a launch.

    Args:
        verb: a key of the files, as "product".
        device: of the weight.
        features: the values of the entries' features, each ≥ 1.
    """
    return _parameters(verb, _name(device), tuple(sorted(features.items())))


@cache
def _parameters(verb: str, device_name: str | None, features: tuple[tuple[str, int], ...]) -> dict[str, int]:
    def distance(entry: Entry) -> tuple[float, float]:
        ratios = {name: abs(math.log2(value / entry["features"][name])) for name, value in features}
        return ratios.pop("bytes"), sum(ratios.values())  # bytes first, because each dtype has a kernel of its own

    # explicit, because Triton is about to change the default; without it a float32 product takes twice the operations
    return min(table(device_name)[verb], key=distance)["parameters"] | {"enable_fp_fusion": True}


def _name(device: torch.device) -> str | None:
    return _device_name(device.index or 0) if device.type == "cuda" else None


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def read(stem: str) -> dict[str, list[Entry]]:
    """The entries in a file of launch/, by verb."""
    contents: dict[str, list[Entry]] = json.loads((FOLDER / f"{stem}.json").read_text())
    return contents


def _common(first: list[str], second: list[str]) -> int:
    """Number of leading words that two names share."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
