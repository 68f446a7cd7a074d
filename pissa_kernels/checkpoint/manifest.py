"""``pissa_manifest.json``: what a residual checkpoint was made of, and what every byte of it hashes to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.names import ADAPTER_FOLDER
from ..files.atomic import RESUMABLE, write_text
from ..files.header import sha256
from ..report import REPORT_NAME
from ..report.strict import load

MANIFEST = "pissa_manifest.json"
FORMAT, VERSION = "pissa_kernels checkpoint", 1
# The report has times in it, which differ between runs, so its digest is in a file of its own.
REPORT = f"{ADAPTER_FOLDER}/{REPORT_NAME}"
REPORT_DIGEST = f"{REPORT}.sha256"


@dataclass(frozen=True)
class Manifest:
    """Every file of a result but the report.

    Attributes:
        plan: options and source of the run (:meth:`pissa_kernels.checkpoint.plan.CheckpointJob.record`).
        files: by path; {"header": digest, "tensors": {name: digest}} where tensors are, else {"sha256": digest}.
        targets: by tensor, {"layer": name in the model, "transposed": stored (in, out)}.
    """

    plan: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    targets: Mapping[str, Mapping[str, Any]]

    @property
    def source(self) -> str:
        """The folder of the original checkpoint, as it was when this was written."""
        return str(self.plan["source"])

    def write(self, folder: Path) -> None:
        """Write it into a folder, with a digest of itself."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "plan": dict(self.plan),
            "files": {name: dict(about) for name, about in self.files.items()},
            "targets": {name: dict(about) for name, about in self.targets.items()},
        }
        text = json.dumps({**record, "sha256": _digest(record)}, indent=1, sort_keys=True) + "\n"
        write_text(folder / MANIFEST, text, suffix=RESUMABLE)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another kind.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {MANIFEST}: it was not written by pissa-kernels init")
        try:
            text = path.read_text(encoding="utf-8")
            record = load(text)
            if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"no {FORMAT!r} of version {VERSION}")
            digest = record.pop("sha256", None)
            whole = json.dumps({**record, "sha256": digest}, indent=1, sort_keys=True) + "\n"
            if digest != _digest(record) or text != whole:
                raise ValueError("its contents do not match its digest")
            return Manifest(record["plan"], record["files"], record["targets"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def _digest(record: Mapping[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode())
