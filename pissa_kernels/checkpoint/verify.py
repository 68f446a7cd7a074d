"""``verify_checkpoint``: every byte of a result against its hash, every tensor against the original checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapter.names import factor_key
from ..files.folder import open_checkpoint
from ..files.header import chunks, read_tensor, sha256_of
from ..numerics import exact_arithmetic
from ..ops import WEIGHT_DTYPES
from ..report import LayerReport
from ..runtime.progress import progress as progress_bar
from ..runtime.workers import run_jobs
from .check_layer import check_layer
from .check_quantized import check_adapted, check_plain
from .findings import Verification
from .folders import Folders, TensorCheck, another_kind, read_hashed
from .manifest import MANIFEST, REPORT, Manifest
from .plan import ADAPTER_WEIGHTS
from .verify_files import check_files
from .verify_stacks import check_stack


def verify_checkpoint(
    base: str | os.PathLike[str], out: str | os.PathLike[str], *, workers: int | None = None, progress: bool = True
) -> Verification:
    """Check an initialized checkpoint against the original. Both are read completely, one tensor at a time.

    Three things are checked: copied tensors and files equal the original's bit for bit, and every byte is the one that
    was written; W_res + s·B·A is W to one rounding; A and B are the triplets of their certificate. Of a quantized
    result, codes and scales are those of quantizing W − s·B·A again, and the errors those of the report.

    Args:
        base: folder of the original checkpoint.
        out: folder that :func:`pissa_kernels.init_checkpoint` has written.
        workers: tensors at a time; None for as many as torch has threads.
        progress: show a bar where stderr is a terminal.

    Returns:
        The findings, empty where everything holds.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder does not exist, or ``out`` has no manifest.
        ValueError: the original or the manifest is damaged, or ``base`` is itself a result of init.

    Examples:
        See :func:`pissa_kernels.init_checkpoint`.
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
    with Folders(checkpoint, out, manifest, verification) as folders, exact_arithmetic(torch.device("cpu")):
        jobs = list(_jobs(folders, reports))
        with progress_bar(len(jobs), "verify", unit="tensor", shown=progress) as tick:

            def done(check: TensorCheck) -> None:
                tick(check.name, check.nbytes)
                if check.problem:
                    verification.note(check.name, check.problem)
                for where, what in check.others:
                    verification.note(where, what)
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


def _jobs(
    folders: Folders, reports: dict[str, LayerReport]
) -> Iterator[Callable[[Callable[[TensorCheck], None]], None]]:
    """One job for each tensor of the original, or for a stack. The job of a residual also checks its A and B."""
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
    stacks: dict[str, dict[str, str]] = {}
    for shard, tensor in sorted(listed & originals):
        about = folders.manifest.targets.get(tensor)
        if about is not None and "key" in about:
            stacks.setdefault(about["layer"], {})[tensor] = shard
            continue
        if shard not in folders.headers:
            continue
        layer = reports.get(about["layer"]) if about is not None else None
        if tensor in quantized:
            check = partial(_quantized, folders, shard, tensor, about is not None, layer)
            yield partial(_job, tensor, check)
        elif about is None:
            yield partial(_job, tensor, partial(_copied, folders, shard, tensor))
        else:
            yield partial(_job, tensor, partial(_residual, folders, shard, tensor, about, layer))
    for name, tensors in stacks.items():
        yield partial(_job, name, partial(check_stack, folders, name, tensors, reports.get(name)))


def _job(tensor: str, check: Callable[[], TensorCheck], emit: Callable[[TensorCheck], None]) -> None:
    torch.set_num_threads(1)  # of this thread, and of MKL in the whole process
    try:
        emit(check())
    except (OSError, TypeError, ValueError) as error:  # a file that is too short, a dtype or a tensor it cannot hold
        emit(TensorCheck(tensor, 0, str(error)))


def _copied(folders: Folders, shard: str, tensor: str) -> TensorCheck:
    written, original = folders.written(shard, tensor), folders.original(shard, tensor)
    problem = another_kind(written[1], original[1])
    if not problem and sha256_of(chunks(*written)) != folders.digest(shard, tensor):
        problem = "its bytes are not those that were written"
    if not problem and sha256_of(chunks(*original)) != folders.digest(shard, tensor):
        problem = f"differs from the tensor in {folders.base.folder}"
    return TensorCheck(tensor, written[1].nbytes, problem)


def _residual(
    folders: Folders, shard: str, tensor: str, about: Mapping[str, Any], report: LayerReport | None
) -> TensorCheck:
    (descriptor, info), (_, written) = folders.original(shard, tensor), folders.written(shard, tensor)
    problem = another_kind(written, info)
    if not problem and len(info.shape) != 2:
        problem = f"is {info.shape}, and has a layer in the manifest"
    if problem:
        return TensorCheck(tensor, info.nbytes, problem)
    if ADAPTER_WEIGHTS not in folders.headers or report is None:
        missing = REPORT if report is None else ADAPTER_WEIGHTS
        return TensorCheck(tensor, 0, f"cannot be checked without {missing}")
    problems: list[str] = []
    residual = read_hashed(folders, shard, tensor, problems)
    A, B = (read_hashed(folders, ADAPTER_WEIGHTS, factor_key(about["layer"], factor), problems) for factor in "AB")
    weight = read_tensor(descriptor, info)
    if about["transposed"]:
        weight, residual = weight.mT, residual.mT
    check = check_layer(weight, residual, A, B, report)
    problems += [check.problem] if check.problem else []
    return TensorCheck(tensor, info.nbytes, "; ".join(problems), check)


def _quantized(folders: Folders, shard: str, tensor: str, adapted: bool, report: LayerReport | None) -> TensorCheck:
    """Check the codes and statistics of a weight, and its A and B if the layer has an adapter."""
    about = folders.manifest.quantized[tensor]
    descriptor, info = folders.original(shard, tensor)
    if len(info.shape) != 2 or info.torch_dtype not in WEIGHT_DTYPES:
        return TensorCheck(tensor, info.nbytes, f"is {info.dtype} {info.shape} in {folders.base.folder}")
    if adapted and (ADAPTER_WEIGHTS not in folders.headers or report is None):
        missing = REPORT if report is None else ADAPTER_WEIGHTS
        return TensorCheck(tensor, 0, f"cannot be checked without {missing}")
    m, n = info.shape[::-1] if about["transposed"] else info.shape
    scheme, problems = folders.scheme(), []  # type: ignore[var-annotated]
    stem, stored = tensor.removesuffix("weight"), {}
    for suffix, kind in scheme.layout((m, n)).items():
        stored[suffix] = read_hashed(folders, shard, stem + suffix, problems, tensor)
        if (found := (stored[suffix].dtype, tuple(stored[suffix].shape))) != kind:
            raise ValueError(f"{stem + suffix} is {found[1]} in {found[0]}, not {kind[1]} in {kind[0]}")
    weight = read_tensor(descriptor, info)
    weight = weight.mT if about["transposed"] else weight
    try:
        if adapted and report is not None:
            A, B = (
                read_hashed(folders, ADAPTER_WEIGHTS, factor_key(about["layer"], factor), problems) for factor in "AB"
            )
            check = check_adapted(weight, stored, A, B, report, scheme)
        else:
            check = check_plain(about["layer"], weight, stored, scheme)
    except (RuntimeError, TypeError, ValueError) as error:
        return TensorCheck(tensor, info.nbytes, "; ".join([*problems, str(error)]))
    problems += [check.problem] if check.problem else []
    return TensorCheck(tensor, info.nbytes, "; ".join(problems), quantized=check)
