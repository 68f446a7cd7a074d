"""Launch parameters, from the JSON files in launch/, one per architecture, which ``python -m bench search`` writes.

A device uses the file whose name is the longest beginning of its architecture's ("sm_90"; "gfx" for all of AMD's), over
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

Entry = dict[str, dict[str, int]]


@cache
def architecture(device: torch.device) -> str | None:
    """Name of a device's architecture as compilers have it, "sm_90" or "gfx942"; None for the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return f"sm_{properties.major}{properties.minor}"
    return str(properties.gcnArchName).partition(":")[0]


@cache
def table(name: str | None) -> dict[str, list[Entry]]:
    """The entries of every verb for an architecture: a list of ``{"features": {…}, "parameters": {…}}``."""
    files = sorted(path.stem for path in FOLDER.glob("*.json") if name is not None and name.startswith(path.stem))
    return read(DEFAULT) | (read(files[-1]) if files else {})


def parameters(verb: str, device: torch.device, **features: int) -> dict[str, int]:
    """Block sizes, warps and stages for a launch.

    Args:
        verb: a key of the files, as "product".
        device: of the weight.
        features: the values of the entries' features, each ≥ 1.
    """
    return _parameters(verb, architecture(device), tuple(sorted(features.items())))


@cache
def _parameters(verb: str, name: str | None, features: tuple[tuple[str, int], ...]) -> dict[str, int]:
    def distance(entry: Entry) -> tuple[float, float]:
        ratios = {name: abs(math.log2(value / entry["features"][name])) for name, value in features}
        return ratios.pop("bytes"), sum(ratios.values())  # bytes first, because each dtype has a kernel of its own

    # explicit, because Triton is about to change the default; without it a float32 product takes twice the operations
    return min(table(name)[verb], key=distance)["parameters"] | {"enable_fp_fusion": True}


def read(stem: str) -> dict[str, list[Entry]]:
    """The entries in a file of launch/, by verb."""
    contents: dict[str, list[Entry]] = json.loads((FOLDER / f"{stem}.json").read_text())
    return contents
