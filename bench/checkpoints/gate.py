"""The gate of checkpoints: accuracy of a result on disk, with the tensors of one module in memory at a time.

Tensors are read with the safetensors package and compared in float64, without code of the package under test.
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

from ..harness import gate
from .child import QUANTIZED

# Relative difference of a reported error from float64: sums in float32, and scales that are dequantized otherwise.
REPORT_LIMIT = 1e-4


@dataclass(frozen=True)
class Verdict:
    """Accuracy of one result.

    Attributes:
        reason: why its times do not count; None if it is correct.
        energy_deficit: largest energy deficit of a module's A as stored; None where the result cannot be read.
        rounding: largest :func:`bench.harness.gate.rounding_error` of a module; None likewise.
    """

    reason: str | None
    energy_deficit: float | None = None
    rounding: float | None = None


class Folder:
    """The tensors in the safetensors files of a folder."""

    def __init__(self, path: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            KeyError: no tensor has this name.
        """
        with safe_open(self._files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor


def check_result(provider: str, model: Path, out: Path, modules: Iterable[str], checked: Iterable[str]) -> Verdict:
    """Compare a result with its checkpoint.

    Args:
        provider: name of the provider.
        model: folder of the checkpoint.
        out: folder of the result: the residual model, and its adapter in ``pissa_init``.
        modules: names of all modules to be adapted.
        checked: names of the modules whose factors are compared.
    """
    try:
        base, result, adapter = (Folder(path) for path in (model, out, out / "pissa_init"))
        if provider == QUANTIZED:
            return _quantized(base, result, adapter, out, set(checked))
        config = json.loads((out / "pissa_init" / "adapter_config.json").read_text(encoding="utf-8"))
        reason = _other_tensors(base, result, adapter, set(modules))
        if reason is not None:
            return Verdict(reason)
        figures = np.array([_figures(base, result, adapter, module, config) for module in checked])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        return Verdict(f"the result cannot be read: {type(error).__name__} {error}")
    deficit, rounding = (float(worst) for worst in figures.max(axis=0))  # propagates NaN
    return Verdict(gate.layer_rejection(provider, deficit, rounding), deficit, rounding)


def _figures(
    base: Folder, result: Folder, adapter: Folder, module: str, config: Mapping[str, float]
) -> tuple[float, float]:
    """Energy deficit and rounding error of one module."""
    truth = gate.reference(base.read(f"{module}.weight"))
    A, B = (adapter.read(f"base_model.model.{module}.lora_{factor}.weight") for factor in "AB")
    deficit = gate.subspace_deficit(truth.weight, A, truth.optimum(config["r"]))  # type: ignore[arg-type]
    residual, scaling = result.read(f"{module}.weight"), config["lora_alpha"] / config["r"]
    return deficit, gate.rounding_error(truth.weight, residual, B, A, scaling)


def _quantized(base: Folder, result: Folder, adapter: Folder, out: Path, checked: set[str]) -> Verdict:
    """The errors of quantized residuals in the report against float64, and below those of plain quantization."""
    from bitsandbytes import functional

    report = json.loads((out / "pissa_init" / "pissa_report.json").read_text(encoding="utf-8"))
    for layer in report["layers"]:
        if (module := layer["name"]) not in checked:
            continue
        weight = base.read(f"{module}.weight")
        A, B = (adapter.read(f"base_model.model.{module}.lora_{factor}.weight").double() for factor in "AB")
        plain = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = float((weight.double() - _dequantized(result, module) - layer["scaling"] * B @ A).norm())
        without = float((weight.double() - functional.dequantize_4bit(*plain).double()).norm())
        found = layer["quantization"]
        for name, measured in (("error", error), ("error_without", without)):
            if not abs(found[name] - measured) <= REPORT_LIMIT * measured:
                return Verdict(f"{module}: the report's {name} is {found[name]}, and {measured} in float64")
        if not error < without:
            return Verdict(f"{module}: the error {error} is not below that of plain quantization, {without}")
    return Verdict(None)


def _dequantized(result: Folder, module: str) -> Tensor:
    """The values of a quantized weight by bitsandbytes alone, float64."""
    from bitsandbytes import functional

    stem = f"{module}.weight"
    statistics = {name: result.read(name) for name in result.names() if name.startswith(f"{stem}.")}
    state = functional.QuantState.from_dict(statistics, device=torch.device("cpu"))
    values: Tensor = functional.dequantize_4bit(result.read(stem), state).double()
    return values


def _other_tensors(base: Folder, result: Folder, adapter: Folder, modules: set[str]) -> str | None:
    """Why the names of tensors, or the tensors that are not adapted, are wrong; None if they are right."""
    factors = {f"base_model.model.{module}.lora_{factor}.weight" for module in modules for factor in "AB"}
    if result.names() != base.names() or adapter.names() != factors:
        return "the names of the result's tensors are not those of the checkpoint and its adapter"
    untouched = base.names() - {f"{module}.weight" for module in modules}
    changed = sorted(name for name in untouched if not torch.equal(base.read(name), result.read(name)))
    return f"{changed[0]} has changed" if changed else None
