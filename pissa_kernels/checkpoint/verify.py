"""``verify_checkpoint``: every byte of a result against its hash, every tensor against the original checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapter.names import factor_key
from ..files.atomic import sha256_of_file
from ..files.folder import Checkpoint, open_checkpoint
from ..files.header import Header, TensorInfo, bytes_of, chunks, read_header, read_tensor, sha256, sha256_of
from ..files.system import open_to_read
from ..files.walk import files_of
from ..numerics import exact_arithmetic
from ..report import LayerReport, Report
from ..runtime.progress import progress as progress_bar
from ..runtime.workers import run_jobs
from .check_layer import LayerCheck, check_layer
from .manifest import MANIFEST, REPORT, REPORT_DIGEST, Manifest
from .plan import ADAPTER_CONFIG, ADAPTER_WEIGHTS


class Finding(NamedTuple):
    """One thing that does not hold.

    Attributes:
        where: name of a tensor or file.
        what: what is wrong with it.
    """

    where: str
    what: str


class Verification(list[Finding]):
    """The findings of :func:`verify_checkpoint`, sorted: an empty list where everything holds.

    Attributes:
        layers: check of every residual, in the report's order.
        copied: number of tensors that equal the original's bit for bit.
        files: number of other files that are as they were written.
        extra: files that were not part of the result when it was written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[LayerCheck] = []
        self.copied = 0
        self.files = 0
        self.extra: list[str] = []

    def note(self, where: str, what: str) -> None:
        """Add a finding."""
        self.append(Finding(where, what))


def verify_checkpoint(
    base: str | os.PathLike[str], out: str | os.PathLike[str], *, workers: int | None = None, progress: bool = True
) -> Verification:
    """Check an initialized checkpoint against the original. Both are read completely, one tensor at a time.

    Three things are checked: copied tensors and files equal the original's bit for bit, and every byte is the one that
    was written; W_res + s·B·A is W to one rounding; A and B are the triplets of their certificate.

    Args:
        base: folder of the original checkpoint.
        out: folder that :func:`init_checkpoint` has written.
        workers: tensors at a time; None for as many as torch has threads.
        progress: show a bar where stderr is a terminal.

    Returns:
        The findings, empty where everything holds.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder does not exist, or ``out`` has no manifest.
        ValueError: the original or the manifest is damaged, or ``base`` is itself a result of init.

    Examples:
        See :func:`init_checkpoint`.
    """
    base, out = Path(base), Path(out)
    checkpoint = open_checkpoint(base)
    if not out.exists():
        raise FileNotFoundError(f"{out} does not exist")
    if not out.is_dir():
        raise NotADirectoryError(f"{out} is not a folder")
    if (base / MANIFEST).is_file():
        raise ValueError(
            f"{base} is a result of pissa-kernels init, not the original checkpoint: give the original first, then the "
            "result"
        )
    manifest = Manifest.read(out)
    verification = Verification()
    reports = _check_files(checkpoint, out, manifest, verification)
    threads = torch.get_num_threads()
    with _Folders(checkpoint, out, manifest, verification) as folders, exact_arithmetic(torch.device("cpu")):
        jobs = list(_jobs(folders, reports))
        with progress_bar(len(jobs), "verify", unit="tensor", shown=progress) as tick:

            def done(check: _TensorCheck) -> None:
                tick(check.name, check.nbytes)
                if check.problem:
                    verification.note(check.name, check.problem)
                if check.layer is not None:
                    verification.layers.append(check.layer)
                elif not check.problem:
                    verification.copied += 1

            try:
                run_jobs(jobs, workers or threads, done)
            finally:
                torch.set_num_threads(threads)
    order = {name: index for index, name in enumerate(reports)}
    verification.layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    verification.sort()
    return verification


@dataclass(frozen=True)
class _TensorCheck:
    name: str
    nbytes: int
    problem: str
    layer: LayerCheck | None = None


class _Folders:
    """Both folders with their open files. A shard whose header is damaged is read with the original's header."""

    def __init__(self, base: Checkpoint, out: Path, manifest: Manifest, verification: Verification) -> None:
        self.base, self.out, self.manifest = base, out, manifest
        self.verification = verification
        self.headers: dict[str, Header] = {}
        self.descriptors: dict[tuple[bool, str], int] = {}

    def __enter__(self) -> _Folders:
        for name, about in self.manifest.files.items():
            path = self.out / name
            if "tensors" not in about or not path.is_file():
                continue
            header = self.base.shards.get(name)
            try:
                found = read_header(path)
            except ValueError as error:
                self.verification.note(name, str(error))
            else:
                if sha256(found.encoded) == about["header"]:
                    header = found
                else:
                    self.verification.note(name, "its header is not the one that was written")
            if header is None:
                continue
            self.headers[name] = header
            self.descriptors[False, name] = open_to_read(path)
            if name in self.base.shards:
                self.descriptors[True, name] = open_to_read(self.base.folder / name)
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def written(self, shard: str, tensor: str) -> tuple[int, TensorInfo]:
        info = self.headers[shard].tensors.get(tensor)
        if info is None:
            raise ValueError(f"{shard} has no tensor {tensor}")
        return self.descriptors[False, shard], info

    def original(self, shard: str, tensor: str) -> tuple[int, TensorInfo]:
        return self.descriptors[True, shard], self.base.shards[shard].tensors[tensor]

    def digest(self, shard: str, tensor: str) -> str:
        return str(self.manifest.files[shard]["tensors"].get(tensor))


def _check_files(base: Checkpoint, out: Path, manifest: Manifest, verification: Verification) -> dict[str, LayerReport]:
    """Check everything that is not a tensor. Returns the reports of the layers by name, as far as they are readable."""
    found = set(files_of(out))
    known = {*manifest.files, MANIFEST, REPORT, REPORT_DIGEST}
    for name in sorted(known - found):
        verification.note(name, "is missing")
    for name in sorted(name for name in known & found if not (out / name).is_file()):
        found.remove(name)
        verification.note(name, "is not a regular file")
    verification.extra = sorted(found - known)
    for name, about in manifest.files.items():
        if "tensors" in about or name not in found:
            continue
        if not _holds(out / name, about["sha256"]):
            verification.note(name, "its bytes are not those that were written")
        elif name != ADAPTER_CONFIG and not (base.folder / name).is_file():
            verification.note(name, f"is not a file in {base.folder}")
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


def _jobs(
    folders: _Folders, reports: dict[str, LayerReport]
) -> Iterator[Callable[[Callable[[_TensorCheck], None]], None]]:
    """One job for each tensor of the original. The job of a residual also checks its A and B."""
    listed = {
        (shard, tensor)
        for shard, about in folders.manifest.files.items()
        if shard != ADAPTER_WEIGHTS
        for tensor in about.get("tensors", ())
    }
    originals = {(shard, tensor) for tensor, (shard, _) in folders.base.tensors().items()}
    for shard, tensor in sorted(listed ^ originals):
        where = "the original" if (shard, tensor) in listed else "the result's manifest"
        folders.verification.note(tensor, f"is not in {shard} of {where}")
    for shard, tensor in sorted(listed & originals):
        if shard not in folders.headers:
            continue
        about = folders.manifest.targets.get(tensor)
        if about is None:
            yield partial(_job, tensor, partial(_copied, folders, shard, tensor))
        else:
            layer = reports.get(about["layer"])
            yield partial(_job, tensor, partial(_residual, folders, shard, tensor, about, layer))


def _job(tensor: str, check: Callable[[], _TensorCheck], emit: Callable[[_TensorCheck], None]) -> None:
    torch.set_num_threads(1)  # of this thread, and of MKL in the whole process
    try:
        emit(check())
    except (OSError, TypeError, ValueError) as error:  # a file that is too short, a dtype or a tensor it cannot hold
        emit(_TensorCheck(tensor, 0, str(error)))


def _copied(folders: _Folders, shard: str, tensor: str) -> _TensorCheck:
    written, original = folders.written(shard, tensor), folders.original(shard, tensor)
    problem = _another_kind(written[1], original[1])
    if not problem and sha256_of(chunks(*written)) != folders.digest(shard, tensor):
        problem = "its bytes are not those that were written"
    if not problem and sha256_of(chunks(*original)) != folders.digest(shard, tensor):
        problem = f"differs from the tensor in {folders.base.folder}"
    return _TensorCheck(tensor, written[1].nbytes, problem)


def _another_kind(written: TensorInfo, original: TensorInfo) -> str:
    if (written.dtype, written.shape) == (original.dtype, original.shape):
        return ""
    return f"is {written.dtype} {written.shape}, not {original.dtype} {original.shape}"


def _residual(
    folders: _Folders, shard: str, tensor: str, about: Mapping[str, Any], report: LayerReport | None
) -> _TensorCheck:
    (descriptor, info), (_, written) = folders.original(shard, tensor), folders.written(shard, tensor)
    problem = _another_kind(written, info)
    if not problem and len(info.shape) != 2:
        problem = f"is {info.shape}, and has a layer in the manifest"
    if problem:
        return _TensorCheck(tensor, info.nbytes, problem)
    if ADAPTER_WEIGHTS not in folders.headers or report is None:
        missing = REPORT if report is None else ADAPTER_WEIGHTS
        return _TensorCheck(tensor, 0, f"cannot be checked without {missing}")
    problems: list[str] = []
    residual = _read(folders, shard, tensor, problems)
    A, B = (_read(folders, ADAPTER_WEIGHTS, factor_key(about["layer"], factor), problems) for factor in "AB")
    weight = read_tensor(descriptor, info)
    if about["transposed"]:
        weight, residual = weight.mT, residual.mT
    check = check_layer(weight, residual, A, B, report)
    problems += [check.problem] if check.problem else []
    return _TensorCheck(tensor, info.nbytes, "; ".join(problems), check)


def _read(folders: _Folders, shard: str, tensor: str, problems: list[str]) -> Tensor:
    read = read_tensor(*folders.written(shard, tensor))
    if sha256(bytes_of(read)) != folders.digest(shard, tensor):
        whose = "its" if shard != ADAPTER_WEIGHTS else f"{tensor}'s"
        problems.append(f"{whose} bytes are not those that were written")
    return read
