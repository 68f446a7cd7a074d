"""Judge a result of ``bench.checkpoint`` from what is on the disk, one tensor in memory at a time.

Everything is float64, read with the safetensors package; nothing of the package that is judged is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import gate
from .model import refusal


@dataclass(frozen=True)
class Verdict:
    """What was found of one result.

    Attributes:
        reason: why its times do not count, or None.
        energy_deficit: the largest of the rows of A as stored, against the float64 spectrum of W.
        rounding: the largest |W − W_res − s·B·A|, over what the one rounding of the residual explains.
    """

    reason: str | None
    energy_deficit: float | None = None
    rounding: float | None = None


class Folder:
    """The tensors of all safetensors files of a folder."""

    def __init__(self, path: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor; raises KeyError where there is none of this name."""
        with safe_open(self._files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor


def judge(provider: str, model: Path, out: Path, modules: Iterable[str], checked: Iterable[str]) -> Verdict:
    """Whether a result is right.

    Args:
        provider: who made it.
        model: the checkpoint's folder.
        out: the result's: the residual model, and its adapter in ``pissa_init``.
        modules: every module that had to be adapted, as the model names it.
        checked: those whose factors are looked at.
    """
    try:
        base, result, adapter = (Folder(path) for path in (model, out, out / "pissa_init"))
        config = json.loads((out / "pissa_init" / "adapter_config.json").read_text(encoding="utf-8"))
        reason = _other_tensors(base, result, adapter, set(modules))
        if reason is not None:
            return Verdict(reason)
        figures = np.array([_figures(base, result, adapter, module, config) for module in checked])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        return Verdict(f"the result cannot be read: {type(error).__name__} {error}")
    deficit, rounding = (float(worst) for worst in figures.max(axis=0))  # a NaN stays one
    return Verdict(refusal(provider, deficit, rounding), deficit, rounding)


def _figures(
    base: Folder, result: Folder, adapter: Folder, module: str, config: Mapping[str, float]
) -> tuple[float, float]:
    """Energy deficit, and reconstruction error in units of its rounding, of one module."""
    truth = gate.reference(base.read(f"{module}.weight"))
    A, B = (adapter.read(f"base_model.model.{module}.lora_{factor}.weight") for factor in "AB")
    deficit = gate.subspace_deficit(truth.weight, A, truth.optimum(config["r"]))  # type: ignore[arg-type]
    residual, scaling = result.read(f"{module}.weight"), config["lora_alpha"] / config["r"]
    return deficit, gate.rounding_error(truth.weight, residual, B, A, scaling)


def _other_tensors(base: Folder, result: Folder, adapter: Folder, modules: set[str]) -> str | None:
    """Why the tensors that belong to no module's factors are wrong, or None."""
    factors = {f"base_model.model.{module}.lora_{factor}.weight" for module in modules for factor in "AB"}
    if result.names() != base.names() or adapter.names() != factors:
        return "the result has other tensors than the checkpoint and its adapter"
    untouched = base.names() - {f"{module}.weight" for module in modules}
    changed = sorted(name for name in untouched if not torch.equal(base.read(name), result.read(name)))
    return f"{changed[0]} has changed" if changed else None
