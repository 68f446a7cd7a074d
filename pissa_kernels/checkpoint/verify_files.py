"""Files of a result that are no tensors: their hashes, and the original's files."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..files.atomic import sha256_of_file
from ..files.folder import INDEX, Checkpoint
from ..files.header import read_header, sha256
from ..files.walk import files_of
from ..report import LayerReport, Report
from .findings import Verification
from .manifest import MANIFEST, REPORT, REPORT_DIGEST, Manifest
from .plan import ADAPTER_CONFIG
from .quantized_files import quantized_texts


def check_files(base: Checkpoint, out: Path, manifest: Manifest, verification: Verification) -> dict[str, LayerReport]:
    """Check everything that is not a tensor. Returns the reports of the layers by name, as far as they are readable."""
    found = set(files_of(out))
    known = {*manifest.files, MANIFEST, REPORT, REPORT_DIGEST}
    for name in sorted(known - found):
        verification.note(name, "is missing")
    for name in sorted(name for name in known & found if not (out / name).is_file()):
        found.remove(name)
        verification.note(name, "is not a regular file")
    verification.extra = sorted(found - known)
    texts = _texts(base, out, manifest)
    for name, about in manifest.files.items():
        if "tensors" in about or name not in found:
            continue
        if not _holds(out / name, about["sha256"]):
            verification.note(name, "its bytes are not those that were written")
        elif name != ADAPTER_CONFIG and not (base.folder / name).is_file():
            verification.note(name, f"is not a file in {base.folder}")
        elif name in texts:
            if (text := texts[name]) is not None and sha256(text.encode()) != about["sha256"]:
                verification.note(name, f"is not the file in {base.folder} with the entries of the quantization")
            else:
                verification.files += text is not None
        elif name != ADAPTER_CONFIG and not _holds(base.folder / name, about["sha256"]):
            verification.note(name, f"differs from the file in {base.folder}")
        else:
            verification.files += 1
    if {REPORT, REPORT_DIGEST} <= found:
        if (out / REPORT_DIGEST).read_bytes() != f"{sha256_of_file(out / REPORT)}  {Path(REPORT).name}\n".encode():
            verification.note(REPORT, f"its bytes do not match {Path(REPORT_DIGEST).name}")
        else:
            verification.files += 2
            try:
                return {layer.name: layer for layer in Report.read(out / REPORT).layers}
            except ValueError as error:
                verification.note(REPORT, str(error))
    return {}


def _holds(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of_file(path) == sha256  # reading a pipe would wait for a writer


def _texts(base: Checkpoint, out: Path, manifest: Manifest) -> dict[str, str | None]:
    """What config.json and the index of a quantized result have to contain; None where a shard's header is damaged."""
    if not manifest.quantized:
        return {}
    shards = {}
    for name, about in manifest.files.items():
        if name in base.shards:
            with contextlib.suppress(OSError, ValueError):  # the check of the tensors names the shard
                header = read_header(out / name)
                if sha256(header.encoded) == about["header"]:
                    shards[name] = header
    texts: dict[str, str | None] = dict(quantized_texts(base, shards, manifest.plan["quantization"]["config"]))
    return texts if shards.keys() == base.shards.keys() else {**texts, INDEX: None}
