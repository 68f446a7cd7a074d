"""Report of a merge."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..report.tables import text_table


@dataclass(frozen=True)
class MergedLayer:
    """Report of one layer.

    Attributes:
        name: name of the layer in the model.
        tensor: key of its weight; of the first tensor, where it has several, such as those of single experts.
        shape: shape of that tensor in the result.
        dtype: its dtype in the result, such as "bfloat16".
        rank: rank of the product that was added.
        scaling: s.
        quantized: what the weight was dequantized from: "nf4", "fp4" or "int8"; None if it was not quantized.
        tensors: number of its tensors.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    rank: int
    scaling: float
    quantized: str | None
    tensors: int = 1


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Report of :func:`pissa_kernels.merge_checkpoint`.

    Attributes:
        layers: report of each adapted layer, in the order of the adapter's file.
        out: folder of the result.
        dequantized: number of quantized weights, those of the layers included.
        replaced: keys of tensors that are trained copies from the adapter.
        copied: number of all other tensors.
        size: bytes of the safetensors files of the result.
        notes: remarks for the caller, one sentence each.
    """

    layers: list[MergedLayer]
    out: Path
    dequantized: int
    replaced: list[str]
    copied: int
    size: int
    notes: list[str]

    def table(self) -> str:
        """A row for each layer, the summary, and the notes."""
        rows = [
            [layer.name, "×".join(map(str, layer.shape)), layer.quantized or "", layer.dtype, str(layer.rank)]
            for layer in self.layers
        ]
        heads = ["layer", "shape", "from", "dtype", "rank"]
        lines = [text_table(heads, rows, [0, 1, 2, 3]), "", self.summary()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def summary(self) -> str:
        """One line: folder, size, and what became of the tensors."""
        parts = [f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''} merged"]
        if self.dequantized:
            parts.append(f"{self.dequantized} weights dequantized")
        if self.replaced:
            parts.append(f"{len(self.replaced)} tensors replaced by trained copies")
        parts.append(f"{self.copied} other tensors copied")
        return f"{self.out}: a full checkpoint of {self.size / 2**20:.1f} MiB, {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        layers = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        return {**vars(self), "layers": layers, "out": str(self.out)}

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)
