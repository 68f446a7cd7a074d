"""``pissa_manifest.json``: the source and options of a residual checkpoint, and the hashes of its tensors and files.

``targets`` has every tensor that is a residual, with its ``layer``, the name in the model, and ``transposed``, whether
each matrix is stored (in, out). The factors of a linear layer have the keys of its name. A stack of matrices, such as
the experts of a block, has the name of a parameter, and besides:

- ``key``: the module of its factors, as in "model.layers.0.mlp.experts.base_layer", the wrapper that PEFT makes. They
  are packed: row e·r + k of A (r·E, in) and column k·E + e of B (out, r·E) belong to matrix e.
- Where one tensor is the whole stack, ``experts``: E. Its entry in ``files`` has a hash for each matrix, in a list.
- Where a tensor belongs to one matrix, ``expert``: e, from 0, and ``rows``: the first row of the matrix (out, in) that
  it has, and the one after the last.
"""

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
            A tensor that is a whole stack has a list of hashes, one for each matrix.
        targets: by name of a tensor, {"layer": name in the model, "transposed": whether it is stored (in, out)}, and
            the entries above of a stack.
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
            isinstance(file["header"], str)
            and isinstance(file["tensors"], dict)
            and all(map(_is_hash, file["tensors"].values()))
            if "tensors" in file
            else isinstance(file["sha256"], str)
            for file in files.values()
        )
        and all(
            isinstance(layer["layer"], str) and type(layer["transposed"]) is bool and _is_of_stack(layer)
            for layer in (*targets.values(), *quantized.values())
        )
    )


def _is_hash(value: object) -> bool:
    """Whether a value is the hash of a tensor, or those of its matrices."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _is_of_stack(layer: Mapping[str, Any]) -> bool:
    """Whether the entries of a tensor say which matrices of a stack it has, or none."""
    others = {name: value for name, value in layer.items() if name not in ("layer", "transposed", "key")}
    if "key" not in layer:
        return not others
    match others:
        case {"experts": number}:
            numbers, fits = [number], len(others) == 1
        case {"expert": number, "rows": [first, last]}:
            numbers, fits = [number + 1, last - first, first + 1], len(others) == 2
        case _:
            return False
    return fits and isinstance(layer["key"], str) and all(type(value) is int and value >= 1 for value in numbers)


def _is_quantization(record: object) -> bool:
    """Whether a plan names the format, and what it has added to config.json."""
    kinds = {"kind": str, "double": bool, "block": int, "config": dict}
    return isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in kinds.items())


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps({**record, "sha256": _sha256(record)}, indent=1, sort_keys=True) + "\n"


def _sha256(record: Mapping[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode())
