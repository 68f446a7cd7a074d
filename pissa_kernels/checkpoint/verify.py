"""``verify_checkpoint``: every byte of a result against its hash, every tensor against the original checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.names import factor_key
from ..files.folder import Checkpoint, open_checkpoint
from ..files.header import Header, TensorInfo, bytes_of, chunks, read_header, read_tensor, sha256, sha256_of
from ..files.system import open_to_read
from ..numerics import exact_arithmetic
from ..ops import WEIGHT_DTYPES
from ..quantize.scheme import Scheme
from ..report import LayerReport
from ..runtime.progress import progress as progress_bar
from ..runtime.workers import run_jobs
from .check_layer import LayerCheck, check_layer
from .check_quantized import QuantizedCheck, check_adapted, check_plain
from .findings import Verification
from .manifest import MANIFEST, REPORT, Manifest
from .plan import ADAPTER_WEIGHTS
from .quantization import QuantizationOptions
from .verify_files import check_files


def verify_checkpoint(
    base: str | os.PathLike[str], out: str | os.PathLike[str], *, workers: int | None = None, progress: bool = True
) -> Verification:
    """Check an initialized checkpoint against the original. Both are read completely, one tensor at a time.

    Three things are checked: copied tensors and files equal the original's bit for bit, and every byte is the one that
    was written; W_res + s·B·A is W to one rounding; A and B are the triplets of their certificate. Of a quantized
    result, codes and scales are those of quantizing W − s·B·A again, and the errors those of the report.

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
    reports = check_files(checkpoint, out, manifest, verification)
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
                elif check.quantized is not None:
                    verification.quantized.append(check.quantized)
                elif not check.problem:
                    verification.copied += 1

            try:
                run_jobs(jobs, workers or threads, done)
            finally:
                torch.set_num_threads(threads)
    order = {name: index for index, name in enumerate(reports)}
    verification.layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    verification.quantized.sort(key=lambda layer: (order.get(layer.name, len(order)), layer.name))
    verification.sort()
    return verification


@dataclass(frozen=True)
class _TensorCheck:
    name: str
    nbytes: int
    problem: str
    layer: LayerCheck | None = None
    quantized: QuantizedCheck | None = None


class _Folders:
    """Both folders with their open files.

    A shard whose header is damaged is read with the original's header, or not at all if it holds quantized weights.
    """

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
            if header is not None and sha256(header.encoded) != about["header"]:  # of a quantized result
                header = None
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

    def scheme(self) -> Scheme:
        """The format of the quantized weights."""
        plan = self.manifest.plan["quantization"]
        return QuantizationOptions(plan["kind"], plan["double"], plan["block"]).scheme

    def digest(self, shard: str, tensor: str) -> str:
        return str(self.manifest.files[shard]["tensors"].get(tensor))


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
    quantized = folders.manifest.quantized
    suffixes = folders.scheme().layout((2, 2)) if quantized else {}
    belonging = {tensor.removesuffix("weight") + suffix for tensor in quantized for suffix in suffixes}
    statistics = {(shard, key) for shard, key in listed if key in belonging and key not in quantized}
    for shard, tensor in sorted((listed - statistics) ^ originals):
        where = "the original" if (shard, tensor) in listed else "the result's manifest"
        folders.verification.note(tensor, f"is not in {shard} of {where}")
    for shard, tensor in sorted(listed & originals):
        if shard not in folders.headers:
            continue
        about = folders.manifest.targets.get(tensor)
        layer = reports.get(about["layer"]) if about is not None else None
        if tensor in quantized:
            check = partial(_quantized, folders, shard, tensor, about is not None, layer)
            yield partial(_job, tensor, check)
        elif about is None:
            yield partial(_job, tensor, partial(_copied, folders, shard, tensor))
        else:
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


def _quantized(folders: _Folders, shard: str, tensor: str, adapted: bool, report: LayerReport | None) -> _TensorCheck:
    """Check the codes and statistics of a weight, and its A and B if the layer has an adapter."""
    about = folders.manifest.quantized[tensor]
    descriptor, info = folders.original(shard, tensor)
    if len(info.shape) != 2 or info.torch_dtype not in WEIGHT_DTYPES:
        return _TensorCheck(tensor, info.nbytes, f"is {info.dtype} {info.shape} in {folders.base.folder}")
    if adapted and (ADAPTER_WEIGHTS not in folders.headers or report is None):
        missing = REPORT if report is None else ADAPTER_WEIGHTS
        return _TensorCheck(tensor, 0, f"cannot be checked without {missing}")
    m, n = info.shape[::-1] if about["transposed"] else info.shape
    scheme, problems = folders.scheme(), []  # type: ignore[var-annotated]
    stem, stored = tensor.removesuffix("weight"), {}
    for suffix, kind in scheme.layout((m, n)).items():
        stored[suffix] = _read(folders, shard, stem + suffix, problems, tensor)
        if (found := (stored[suffix].dtype, tuple(stored[suffix].shape))) != kind:
            raise ValueError(f"{stem + suffix} is {found[1]} in {found[0]}, not {kind[1]} in {kind[0]}")
    weight = read_tensor(descriptor, info)
    weight = weight.mT if about["transposed"] else weight
    try:
        if adapted and report is not None:
            A, B = (_read(folders, ADAPTER_WEIGHTS, factor_key(about["layer"], factor), problems) for factor in "AB")
            check = check_adapted(weight, stored, A, B, report, scheme)
        else:
            check = check_plain(about["layer"], weight, stored, scheme)
    except (RuntimeError, TypeError, ValueError) as error:
        return _TensorCheck(tensor, info.nbytes, "; ".join([*problems, str(error)]))
    problems += [check.problem] if check.problem else []
    return _TensorCheck(tensor, info.nbytes, "; ".join(problems), quantized=check)


def _read(folders: _Folders, shard: str, tensor: str, problems: list[str], checked: str | None = None) -> Tensor:
    read = read_tensor(*folders.written(shard, tensor))
    if sha256(bytes_of(read)) != folders.digest(shard, tensor):
        whose = "its" if shard != ADAPTER_WEIGHTS and tensor == (checked or tensor) else f"{tensor}'s"
        problems.append(f"{whose} bytes are not those that were written")
    return read
