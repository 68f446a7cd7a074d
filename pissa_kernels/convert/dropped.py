"""What a plain LoRA of the 16-bit model drops where the residual is quantized: E = W − W_q − s·B₀·A₀.

The trained layer is W_q + s·B·A = W − E + s·(B·A − B₀·A₀). Training started from W − E, and compensated for E as far as
it could; the plain LoRA on W has the second term alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..files.header import read_header
from ..peft.saving import sidecar
from ..report import REPORT_NAME, Report
from .adapter import AdapterFile


@dataclass(frozen=True)
class Dropped:
    """‖E‖_F of a layer, or of all layers together.

    Attributes:
        error: ‖E‖_F.
        change: ‖ΔW‖_F, of what training did.
        weight: ‖W‖_F; None if the original model was not read.
    """

    error: float
    change: float
    weight: float | None

    @property
    def of_change(self) -> float | None:
        """‖E‖_F/‖ΔW‖_F; None if training did nothing."""
        return self.error / self.change if self.change else None

    @property
    def of_weight(self) -> float | None:
        """‖E‖_F/‖W‖_F; None if the original model was not read, or is 0."""
        return self.error / self.weight if self.weight else None

    def to_dict(self) -> dict[str, float | None]:
        """A JSON object."""
        return {"error": self.error, "of_change": self.of_change, "of_weight": self.of_weight}

    def describe(self) -> str:
        """One sentence."""
        shares = [
            f"{100 * share:.3g} % of {of}"
            for share, of in ((self.of_change, "‖ΔW‖_F"), (self.of_weight, "‖W‖_F"))
            if share is not None
        ]
        return (
            "the residual is quantized, and the plain LoRA drops E = W − W_q − s·B₀·A₀, for which training "
            f"compensated: ‖E‖_F of all layers is {self.error:.3g}{', ' if shares else ''}{' and '.join(shares)}"
        )


def together(layers: Iterable[Dropped]) -> Dropped | None:
    """Of all layers together; None if there are none."""
    found = list(layers)
    if not found:
        return None
    weights = [layer.weight for layer in found if layer.weight is not None]
    return Dropped(
        math.hypot(*(layer.error for layer in found)),
        math.hypot(*(layer.change for layer in found)),
        math.hypot(*weights) if len(weights) == len(found) else None,
    )


def recorded_errors(initial: AdapterFile) -> dict[str, float]:
    """‖E‖_F of each quantized layer, by its name, from the report of the initialization.

    It is in the header of a ``pissa_initial.safetensors``, and in a file beside an adapter of ``init``.

    Raises:
        ValueError: the report is damaged.
    """
    if initial.path.name == sidecar.INITIAL_NAME:
        report = Report.from_dict(json.loads(read_header(initial.path).metadata["pissa_kernels"]))
    elif (path := initial.path.parent / REPORT_NAME).is_file():
        report = Report.read(path)
    else:
        return {}
    return {layer.name: layer.quantization.error for layer in report.layers if layer.quantization is not None}
