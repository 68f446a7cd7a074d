"""Report of a quantized residual."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import strict


@dataclass(frozen=True)
class Quantization:
    """What quantizing the residual of one layer loses. Errors are of E = W − W_q − s·B·A, with W_q as it is stored.

    Attributes:
        scheme: the format and its settings.
        error: ‖E‖_F.
        error_without: ‖W − Q(W)‖_F, the error of the same format without PiSSA.
        iterations: alternations of SVD and quantization that the result is of.
        nuclear_error: sum of the singular values of E; None unless asked for.
        nuclear_error_without: the same of W − Q(W).

    Examples:
        >>> from pissa_kernels.report.quantization import Quantization
        >>> found = Quantization("nf4, blocks of 64", error=0.5, error_without=1.0, iterations=5)
        >>> f"{found.saved:.0%} of the error saved"
        '50% of the error saved'
    """

    scheme: str
    error: float
    error_without: float
    iterations: int
    nuclear_error: float | None = None
    nuclear_error_without: float | None = None

    @property
    def saved(self) -> float:
        """Share of the error that PiSSA saves, 1 − error/error_without; 0 where there is no error to save."""
        return 1.0 - self.error / self.error_without if self.error_without > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that :func:`quantization_from_dict` reads."""
        return dataclasses.asdict(self)


def errors_of_all(found: Sequence[Quantization]) -> str:
    """The errors of all layers together, as in "25.1 % less quantization error in 7 layers"."""
    error, without = (math.hypot(*(getattr(each, name) for each in found)) for name in ("error", "error_without"))
    layers = f"in {len(found)} layer{'s' if len(found) > 1 else ''}"
    if error > without:
        return f"MORE quantization error than without PiSSA ({error:.3g} instead of {without:.3g}) {layers}"
    return f"{100 * (1 - error / without if without else 0):.1f} % less quantization error {layers}"


def quantization_from_dict(record: object, path: str) -> Quantization:
    """Read the JSON object of :meth:`Quantization.to_dict`.

    Raises:
        ValueError: the record is not such an object.
    """
    return Quantization(**strict.fields(record, path, _RULES))


_RULES = {
    "scheme": strict.STRING,
    "error": strict.NUMBER,
    "error_without": strict.NUMBER,
    "iterations": strict.Rule("an integer ≥ 1", lambda value: strict.is_integer(value, 1)),
    "nuclear_error": strict.optional(strict.NUMBER),
    "nuclear_error_without": strict.optional(strict.NUMBER),
}
