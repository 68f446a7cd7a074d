"""Report of the initialization of a model: as an object, as a table, and as a JSON file."""

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
from .layer import TEXT_COLUMNS, LayerReport, layer_from_dict, layer_table, layer_to_dict, rank_range
from .quantization import errors_of_all
from .spectrum import energy_of_all
from .tables import text_table

REPORT_NAME = "pissa_report.json"
FORMAT, VERSION = "pissa_kernels report", 1

_REPORT_RULES = {
    "format": strict.STRING,
    "version": strict.INTEGER,
    "package": strict.STRING,
    "torch": strict.STRING,
    "seconds": strict.optional(strict.NUMBER),
    "peak_extra_bytes": strict.optional(strict.COUNT),
    "layers": strict.ARRAY,
}


@dataclass(eq=False, repr=False)
class Report:
    """Report of the initialization of a model.

    Attributes:
        layers: report of each initialized layer, in the order of the work.
        seconds: wall time of the whole initialization, in seconds; None if it was not measured.
        peak_extra_bytes: peak memory beyond the model, in bytes; None if it was not measured.
        package_version: version of pissa_kernels that did the work.
        torch_version: version of torch that did the work.

    Examples:
        >>> import torch
        >>> from pissa_kernels import Certificate, LayerReport, Report
        >>> certificate = Certificate(passes=5, energy=0.5, residual=2e-6, converged=True, method="krylov")
        >>> sigma = torch.tensor([4.0, 2.0])
        >>> layer = LayerReport("lm_head", (64, 48), 2, certificate, 0.25, sigma, torch.bfloat16, 1.0, "pissa", seed=0)
        >>> report = Report(layers=[layer])
        >>> report
        <Report: 1 layer, rank 2, 50.00 % of the energy, residual/σ₁ ≤ 2e-06, all converged, 0.250 s in layers>
        >>> [layer.name for layer in report.layers if layer.certificate.converged]
        ['lm_head']
    """

    layers: list[LayerReport] = field(default_factory=list)
    seconds: float | None = None
    peak_extra_bytes: int | None = None
    package_version: str = __version__
    torch_version: str = field(default_factory=lambda: str(torch.__version__))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def table(self, *, parts: bool = False) -> str:
        """A row for each layer, and the summary: energy in % of ‖W‖_F², the residual relative to σ₁, times in ms.

        Args:
            parts: below a layer of several matrices, such as a stack of experts, show a row for each of them.

        Examples:
            >>> import torch
            >>> from pissa_kernels import Certificate, LayerReport, Report
            >>> certificate = Certificate(passes=5, energy=0.5, residual=2e-6, converged=True, method="krylov")
            >>> sigma = torch.tensor([4.0, 2.0])
            >>> layer = LayerReport("fc", (64, 48), 2, certificate, 0.25, sigma, torch.bfloat16, 1.0, "pissa", seed=0)
            >>> print(Report([layer]).table())
            layer  shape  dtype     r  energy, %  σ₁  σ_r  residual/σ₁  passes  method  converged     ms
            -----  -----  --------  -  ---------  --  ---  -----------  ------  ------  ---------  -----
            fc     64×48  bfloat16  2      50.00   4    2        2e-06       5  krylov  yes        250.0
            <BLANKLINE>
            1 layer, rank 2, 50.00 % of the energy, residual/σ₁ ≤ 2e-06, all converged, 0.250 s in layers
        """
        rows = [row for layer in self.layers for row in (layer, *(layer.parts if parts else ()))]
        return text_table(*layer_table(rows), TEXT_COLUMNS) + "\n\n" + self.summary()

    def summary(self) -> str:
        """One line: layers, rank, captured energy of all weights (ΣΣσ̂²/Σ‖W‖_F²), largest residual, time and memory.

        Examples:
            >>> import torch
            >>> from pissa_kernels import Certificate, LayerReport, Report
            >>> certificate = Certificate(passes=5, energy=0.5, residual=2e-6, converged=True, method="krylov")
            >>> sigma = torch.tensor([4.0, 2.0])
            >>> layer = LayerReport("fc", (64, 48), 2, certificate, 0.25, sigma, torch.bfloat16, 1.0, "pissa", seed=0)
            >>> print(Report([layer], seconds=0.5, peak_extra_bytes=2**20).summary())  # doctest: +NORMALIZE_WHITESPACE
            1 layer, rank 2, 50.00 % of the energy, residual/σ₁ ≤ 2e-06, all converged, 0.250 s in layers,
            0.500 s in all, 1.0 MiB extra at the peak
        """
        if not self.layers:
            return "no layer was initialized"
        loose = sum(not layer.certificate.converged for layer in self.layers)
        quantized = [layer.quantization for layer in self.layers if layer.quantization is not None]
        matrices = sum(max(1, len(layer.parts)) for layer in self.layers)
        parts = [
            f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
            + (f" of {matrices} matrices" if matrices > len(self.layers) else ""),
            rank_range(self.layers),
            f"{100 * energy_of_all(self.layers):.2f} % of the energy",
            f"residual/σ₁ ≤ {max(layer.certificate.residual for layer in self.layers):.0e}",
            f"{loose} not converged" if loose else "all converged",
            f"{sum(layer.seconds for layer in self.layers):.3f} s in layers",
        ]
        if quantized:
            parts.insert(3, errors_of_all(quantized))
        if self.seconds is not None:
            parts.append(f"{self.seconds:.3f} s in all")
        if self.peak_extra_bytes is not None:
            parts.append(f"{self.peak_extra_bytes / 2**20:.1f} MiB extra at the peak")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_dict` reads; each float32 is written exactly."""
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
        """The report as one line of JSON.

        Raises:
            ValueError: :meth:`from_dict` would refuse the report, for instance because a number is NaN.
        """
        record = self.to_dict()
        Report.from_dict(record)
        return json.dumps(record, allow_nan=False)

    def write(self, path: str | Path) -> None:
        """Write the report as a JSON file, atomically: a reader sees the old file or the new one.

        Args:
            path: the file; an existing one is replaced.

        Raises:
            OSError: the file cannot be written. An existing file is unchanged then.
            ValueError: :meth:`to_json` refuses the report.

        Examples:
            >>> import tempfile
            >>> from pathlib import Path
            >>> from pissa_kernels import Report
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Report(seconds=0.5).write(Path(folder, "pissa_report.json"))
            ...     print([path.name for path in Path(folder).iterdir()])
            ['pissa_report.json']
        """
        write_text(Path(path), self.to_json() + "\n")

    # Static, because constructing a subclass such as PatchedPeft starts work.
    @staticmethod
    def from_dict(record: object) -> Report:
        """Read the JSON object that :meth:`to_dict` made.

        Raises:
            ValueError: the record is not such an object; the message names what was found and what is accepted.
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
        """Read the JSON file that :meth:`write` wrote.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not a report; the message names the file, what was found and what is accepted.

        Examples:
            >>> import tempfile
            >>> from pathlib import Path
            >>> from pissa_kernels import Report
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Report(seconds=0.5).write(Path(folder, "pissa_report.json"))
            ...     Report.read(Path(folder, "pissa_report.json")).seconds
            0.5
        """
        try:
            return Report.from_dict(strict.load(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is not a report: {error}") from None


def find_report(source: str | Path) -> Path:
    """Path of a report's file.

    Args:
        source: the file, a folder that holds it, or a folder whose ``pissa_init`` folder holds it.

    Raises:
        FileNotFoundError: there is no report; the message names the places that were searched.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from pissa_kernels import Report
        >>> from pissa_kernels.report import find_report
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "pissa_init").mkdir()
        ...     Report().write(Path(folder, "pissa_init", "pissa_report.json"))
        ...     find_report(folder).relative_to(folder).as_posix()
        'pissa_init/pissa_report.json'
    """
    source = Path(source)
    if not source.is_dir():
        if source.is_file():
            return source
        raise FileNotFoundError(f"{source} {'is not a file' if source.exists() else 'does not exist'}")
    for path in (source / REPORT_NAME, source / ADAPTER_FOLDER / REPORT_NAME):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{source} holds no report: neither {REPORT_NAME} nor {ADAPTER_FOLDER}/{REPORT_NAME}")
