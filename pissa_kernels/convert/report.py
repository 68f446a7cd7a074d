"""Report of a conversion: as an object, as a table, and as a JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..report import Report
from ..report.tables import text_table
from .dropped import Dropped


@dataclass(frozen=True)
class ConvertedLayer:
    """Report of one layer.

    Attributes:
        name: name of the layer in the base model.
        shape: (out, in) of the weight; of each matrix, where there are several.
        rank: rank in the plain LoRA's config.
        scaling: s, which is that of the trained adapter.
        loss: ‖ΔW − ΔW_K‖_F / ‖ΔW‖_F of all its matrices together; 0 at rank 2r, and for an untrained layer.
        dropped: what the plain LoRA drops, if the residual is quantized and that is known; None otherwise.
        parts: number of matrices: the experts of a stack, the groups of a convolution; 1 for other layers.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    loss: float
    dropped: Dropped | None = None
    parts: int = 1

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; "dropped" is absent where nothing is, "parts" where there is one matrix."""
        record = {key: getattr(self, key) for key in ("name", "shape", "rank", "scaling", "loss")}
        record["shape"] = list(self.shape)
        if self.parts > 1:
            record["parts"] = self.parts
        return record if self.dropped is None else {**record, "dropped": self.dropped.to_dict()}


@dataclass(eq=False, repr=False, kw_only=True)
class ConversionReport(Report):
    """Report of :func:`pissa_kernels.convert_adapter`. It can be written to a file, but not read back.

    Attributes:
        layers: report of each layer, in the order of the trained adapter's file.
        out: folder of the plain LoRA.
        base: base model in the plain LoRA's config; None if it is not known.
        loss: ‖ΔW − ΔW_K‖_F / ‖ΔW‖_F of all layers together.
        carried: keys of the trained adapter's other tensors, which were copied.
        checked: largest difference between W and W_res + s·B₀·A₀ in any layer, relative to its rounding bound (≤ 1);
            None if the models were not compared, or the residual is quantized.
        dropped: what the plain LoRA drops in all layers together, if the residual is quantized and that is known.
        notes: remarks for the caller, one sentence each.
    """

    # entries without a certificate; a list is invariant in its type
    layers: list[ConvertedLayer]  # type: ignore[assignment]
    out: Path
    base: str | None
    loss: float
    carried: list[str]
    checked: float | None
    notes: list[str]
    dropped: Dropped | None = None

    def table(self, *, parts: bool = False) -> str:
        """A row for each layer, the summary, and a line for everything else that the caller should know.

        Args:
            parts: without effect; a row holds for all matrices of its layer.
        """
        heads = ["layer", "rank", "loss"]
        rows = [[layer.name, str(layer.rank), f"{layer.loss:.2e}"] for layer in self.layers]
        if self.dropped is not None:
            heads += ["‖E‖/‖ΔW‖", "‖E‖/‖W‖"]
            rows = [[*row, *_shares(layer.dropped)] for row, layer in zip(rows, self.layers, strict=True)]
        lines = [text_table(heads, rows), "", self.summary()]
        if self.dropped is not None:
            lines.append(self.dropped.describe())
        if self.carried:
            lines.append(f"{len(self.carried)} other tensors were copied")
        if self.checked is not None:
            lines.append(f"W_res + s·B₀·A₀ equals W of the base model within {self.checked:.2f} of the rounding bound")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def summary(self) -> str:
        """One line: folder, base model, number of layers, rank, and loss of all layers together."""
        ranks = [layer.rank for layer in self.layers]
        rank_range = " to ".join(map(str, sorted({min(ranks), max(ranks)})))
        return (
            f"{self.out}: a plain LoRA of {self.base or 'a model that is not named'}, {len(ranks)} "
            f"layer{'s' if len(ranks) > 1 else ''}, rank {rank_range}, loss {self.loss:.2e} of all layers together"
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "out": str(self.out),
            "base": self.base,
            "layers": [layer.to_dict() for layer in self.layers],
            "loss": self.loss,
            "carried": self.carried,
            "checked": self.checked,
            "notes": self.notes,
            **({} if self.dropped is None else {"dropped": self.dropped.to_dict()}),
        }

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_dict(record: object) -> NoReturn:
        """Refuse.

        Raises:
            TypeError: always.
        """
        raise TypeError("a conversion report cannot be read back; read its file with json.load")

    @staticmethod
    def read(path: str | Path) -> NoReturn:
        """Refuse.

        Raises:
            TypeError: always.
        """
        ConversionReport.from_dict(path)


def _shares(dropped: Dropped | None) -> list[str]:
    """Cells of a table."""
    shares = (None, None) if dropped is None else (dropped.of_change, dropped.of_weight)
    return ["" if share is None else f"{share:.2e}" for share in shares]
