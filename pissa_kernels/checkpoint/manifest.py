"""``pissa_manifest.json``: the source and options of a residual checkpoint, and the hashes of its tensors and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter.names import ADAPTER_FOLDER
from ..files.atomic import RESUMABLE, write_text
from ..files.header import sha256
from ..report import REPORT_NAME
from ..report.strict import load

MANIFEST = "pissa_manifest.json"
FORMAT, VERSION = "pissa_kernels checkpoint", 1
# The report contains times, which differ between runs. Its hash is in a file of its own, so that manifests are equal.
REPORT = f"{ADAPTER_FOLDER}/{REPORT_NAME}"
REPORT_DIGEST = f"{REPORT}.sha256"


@dataclass(frozen=True)
class Manifest:
    """The source of a result, and the hashes of all its files but the report.

    Attributes:
        plan: options and source of the run (:meth:`pissa_kernels.checkpoint.plan.CheckpointJob.record`).
        files: by path, {"header": hash, "tensors": {name: hash}} of a safetensors file, {"sha256": hash} of another.
        targets: by name of a tensor, {"layer": name in the model, "transposed": whether it is stored (in, out)}.
        quantized: the same of the tensors that have become quantized, targets or not.
    """

    plan: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    targets: Mapping[str, Mapping[str, Any]]
    quantized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Path of the original checkpoint, as it was when the manifest was written."""
        return str(self.plan["source"])

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder, with its own hash."""
        record: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "plan": dict(self.plan),
            "files": {name: dict(file) for name, file in self.files.items()},
            "targets": {name: dict(target) for name, target in self.targets.items()},
        }
        if self.quantized:  # absent elsewhere, so that other versions read the manifest
            record["quantized"] = {name: dict(layer) for name, layer in self.quantized.items()}
        write_text(folder / MANIFEST, _text(record), suffix=RESUMABLE)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or in a format of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {MANIFEST}: give a folder that pissa-kernels init has written")
        try:
            text = path.read_text(encoding="utf-8")
            record = load(text)
            if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"its format is not {FORMAT!r}, version {VERSION}")
            if record.pop("sha256", None) != _sha256(record) or text != _text(record):
                raise ValueError("its contents do not match its hash")
            if not _is_complete(record):
                raise ValueError("it lacks hashes of files, or what they are hashes of")
            return Manifest(record["plan"], record["files"], record["targets"], record.get("quantized", {}))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged: {error if isinstance(error, ValueError) else f'no {error}'}"
            ) from None


def _is_complete(record: Mapping[str, Any]) -> bool:
    """Whether the plan names the source, every file has its hashes, and every target its layer."""
    plan, files, targets = (record[key] for key in ("plan", "files", "targets"))
    quantized = record.get("quantized", {})
    return (
        all(isinstance(part, dict) for part in (plan, files, targets, quantized))
        and isinstance(plan["source"], str)
        and (not quantized or _is_quantization(plan.get("quantization")))
        and all(isinstance(part, dict) for part in (*files.values(), *targets.values(), *quantized.values()))
        and all(
            isinstance(file["header"], str) and isinstance(file["tensors"], dict)
            if "tensors" in file
            else isinstance(file["sha256"], str)
            for file in files.values()
        )
        and all(
            isinstance(layer["layer"], str) and type(layer["transposed"]) is bool
            for layer in (*targets.values(), *quantized.values())
        )
    )


def _is_quantization(record: object) -> bool:
    """Whether a plan names the format, and what it has added to config.json."""
    kinds = {"kind": str, "double": bool, "block": int, "config": dict}
    return isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in kinds.items())


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps({**record, "sha256": _sha256(record)}, indent=1, sort_keys=True) + "\n"


def _sha256(record: Mapping[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode())
