"""What an initialisation did, layer by layer: as objects, as a table, and as a JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..adapter.names import ADAPTER_FOLDER
from ..files.atomic import write_text
from . import strict
from .layer import HEADS, TEXT_COLUMNS, LayerReport, layer_from_dict, layer_row, layer_to_dict
from .tables import text_table

__all__ = ["REPORT_NAME", "LayerReport", "Report", "find_report"]

REPORT_NAME = "pissa_report.json"
FORMAT, VERSION = "pissa_kernels report", 1

_REPORT_RULES = {
    "format": strict.TEXT,
    "version": strict.INTEGER,
    "package": strict.TEXT,
    "torch": strict.TEXT,
    "seconds": strict.optional(strict.NUMBER),
    "peak_extra_bytes": strict.optional(strict.COUNT),
    "layers": strict.Rule("an array", lambda value: isinstance(value, list)),
}


@dataclass(eq=False, repr=False)
class Report:
    """What an initialisation did to a model.

    Attributes:
        layers: one entry for each initialised layer, in the order of the work.
        seconds: wall time of all of it; None where it was not taken.
        peak_extra_bytes: most memory in use beyond the model, in bytes; None where it was not measured.
        package_version: of the pissa_kernels that did the work.
        torch_version: that it ran on.
    """

    layers: list[LayerReport] = field(default_factory=list)
    seconds: float | None = None
    peak_extra_bytes: int | None = None
    package_version: str = __version__
    torch_version: str = field(default_factory=lambda: str(torch.__version__))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def table(self) -> str:
        """A row for each layer and a line for all: energy in % of ‖W‖_F², the residual over σ₁, times in ms."""
        return text_table(HEADS, [layer_row(layer) for layer in self.layers], TEXT_COLUMNS) + "\n\n" + self.summary()

    def summary(self) -> str:
        """The total line: layers, energy of all together (ΣΣσ̂²/Σ‖W‖_F²), worst residual, time, memory."""
        from .spectrum import energy_of_all

        if not self.layers:
            return "no layer was initialised"
        ranks = sorted({layer.rank for layer in self.layers})
        loose = sum(not layer.certificate.converged for layer in self.layers)
        parts = [
            f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}",
            f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else ""),
            f"{100 * energy_of_all(self.layers):.2f} % of the energy",
            f"residual/σ₁ ≤ {max(layer.certificate.residual for layer in self.layers):.0e}",
            f"{loose} not converged" if loose else "all converged",
            f"{sum(layer.seconds for layer in self.layers):.3f} s in layers",
        ]
        if self.seconds is not None:
            parts.append(f"{self.seconds:.3f} s in all")
        if self.peak_extra_bytes is not None:
            parts.append(f"{self.peak_extra_bytes / 2**20:.1f} MiB extra at the peak")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The report in what JSON has; :meth:`from_dict` takes it back. A float32 is the same number as a float."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "package": self.package_version,
            "torch": self.torch_version,
            "seconds": self.seconds,
            "peak_extra_bytes": self.peak_extra_bytes,
            "layers": [layer_to_dict(layer) for layer in self.layers],
        }

    def to_json(self) -> str:
        """One line of JSON.

        Raises:
            ValueError: the report holds what :meth:`from_dict` refuses, such as a NaN, which JSON does not have.
        """
        record = self.to_dict()
        Report.from_dict(record)
        return json.dumps(record, allow_nan=False)

    def write(self, path: str | Path) -> None:
        """Write the JSON file; whoever reads ``path`` meanwhile finds the old file or the new one, never a part.

        Raises:
            OSError: it cannot be written; a file that was there is untouched then.
            ValueError: as of :meth:`to_json`.
        """
        write_text(Path(path), self.to_json() + "\n")

    # Static, because a subclass is the report of work that it has done itself.
    @staticmethod
    def from_dict(record: object) -> Report:
        """The report that :meth:`to_dict` describes.

        Raises:
            ValueError: it describes none; the message says what was found and what is accepted.
        """
        found = (record.get("format"), record.get("version")) if isinstance(record, dict) else None
        if found != (FORMAT, VERSION):
            what = strict.quote(record)
            if found:
                what = f"format {strict.quote(found[0])}, version {strict.quote(found[1])}"
            raise ValueError(f"found {what}; accepted is an object with format {FORMAT!r}, version {VERSION}")
        values = strict.fields(record, "the report", _REPORT_RULES)
        return Report(
            layers=[layer_from_dict(layer, f"layers[{index}]") for index, layer in enumerate(values["layers"])],
            seconds=None if values["seconds"] is None else float(values["seconds"]),
            peak_extra_bytes=values["peak_extra_bytes"],
            package_version=values["package"],
            torch_version=values["torch"],
        )

    @staticmethod
    def read(path: str | Path) -> Report:
        """The report that :meth:`write` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a report; the message names the file, what was found and what is accepted.
        """
        try:
            return Report.from_dict(strict.load(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is not a report: {error}") from None


def find_report(source: str | Path) -> Path:
    """The report's file: ``source`` itself, or in that folder, or in its ``pissa_init`` folder.

    Raises:
        FileNotFoundError: there is none; the message says where it was looked for.
    """
    source = Path(source)
    if not source.is_dir():
        if source.exists():
            return source
        raise FileNotFoundError(f"{source} does not exist")
    for path in (source / REPORT_NAME, source / ADAPTER_FOLDER / REPORT_NAME):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{source} holds no report: neither {REPORT_NAME} nor {ADAPTER_FOLDER}/{REPORT_NAME}")
