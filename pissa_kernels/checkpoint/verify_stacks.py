"""Stacks of matrices in a result: every matrix against the original's, and the packed factors against their hashes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapter.names import factor_key
from ..files.header import TensorInfo, bytes_of, chunks, read_tensor, sha256, sha256_of
from ..report import LayerReport
from ..report.layer import frobenius_squared, of_parts
from .check_layer import LayerCheck, check_layer
from .folders import Folders, TensorCheck, another_kind
from .manifest import REPORT
from .plan import ADAPTER_WEIGHTS


@dataclass(frozen=True)
class _Piece:
    """Rows of one matrix.

    Attributes:
        shard, tensor: the tensor that has them.
        matrix: the number of the matrix in the tensor, if that is the whole stack.
        sha256: hash of their bytes in the result.
    """

    shard: str
    tensor: str
    matrix: int | None
    sha256: str

    def read(self, tensor: tuple[int, TensorInfo]) -> Tensor:
        """The rows, from the tensor's file and place."""
        descriptor, info = tensor
        return read_tensor(descriptor, info if self.matrix is None else info.matrix(self.matrix))


def check_stack(folders: Folders, name: str, tensors: Mapping[str, str], report: LayerReport | None) -> TensorCheck:
    """Check the residual of every matrix of a stack, and its A and B. In memory are one matrix at a time, and B.

    Args:
        folders: both folders.
        name: name of the layer.
        tensors: shards of its tensors, by name.
        report: the layer's entry in the report of the run, if it is readable.
    """
    missing = [shard for shard in (ADAPTER_WEIGHTS, *tensors.values()) if shard not in folders.headers]
    if report is None or missing:
        return TensorCheck(name, 0, f"cannot be checked without {REPORT if report is None else missing[0]}")
    for tensor, shard in tensors.items():
        if problem := another_kind(folders.written(shard, tensor)[1], folders.original(shard, tensor)[1]):
            return TensorCheck(name, 0, "", others=((tensor, problem),))
    about = {tensor: folders.manifest.targets[tensor] for tensor in tensors}
    pieces = _pieces(folders, tensors, about, report)
    if not pieces:
        return TensorCheck(name, 0, f"the manifest and {REPORT} do not have the same matrices of it")
    first = next(iter(about.values()))
    problems = [] if _is_summary(report) else [f"its entry in {REPORT} is not that of its parts"]
    A, B = (_factor(folders, factor_key(first["key"], factor), problems) for factor in "AB")
    if problem := _other_factors(A[1], B[1], report):
        return TensorCheck(name, 0, "; ".join([*problems, problem]))
    packed_B = read_tensor(*B)
    checks: list[LayerCheck] = []
    others: list[tuple[str, str]] = []
    nbytes = 0
    for index, (own, part) in enumerate(zip(pieces, report.parts, strict=True)):
        weight, residual = _matrices(folders, own, others)
        nbytes += weight.nbytes
        if first["transposed"]:
            weight, residual = weight.mT, residual.mT
        rows = read_tensor(A[0], A[1].rows(report.rank * index, report.rank * (index + 1)))
        check = check_layer(weight, residual, rows, packed_B[:, index :: len(pieces)], part)
        if check.problem:
            others.append((own[0].tensor, f"{part.name}: {check.problem}"))
        checks.append(check)
    return TensorCheck(name, nbytes, "; ".join(problems), _together(report, checks, problems), others=tuple(others))


def _pieces(
    folders: Folders, tensors: Mapping[str, str], about: Mapping[str, Mapping[str, Any]], report: LayerReport
) -> list[list[_Piece]]:
    """What each matrix consists of; empty if the manifest does not have every row of every matrix once."""
    if len({(entry["key"], entry["transposed"]) for entry in about.values()}) != 1:
        return []
    stored = report.shape[::-1] if next(iter(about.values()))["transposed"] else report.shape
    found: dict[int, list[tuple[list[int], _Piece]]] = {index: [] for index in range(len(report.parts))}
    for tensor, shard in tensors.items():
        entry, shape = about[tensor], folders.original(shard, tensor)[1].shape
        hashes = folders.manifest.files[shard]["tensors"][tensor]
        if "experts" in entry:
            number = len(hashes) if isinstance(hashes, list) and len(tensors) == 1 else 0
            if shape != (number, *stored) or not number == entry["experts"] == len(found):
                return []
            for index, sha256_ in enumerate(hashes):
                found[index].append(([0, report.shape[0]], _Piece(shard, tensor, index, sha256_)))
            continue
        first, last = entry["rows"]
        if entry["expert"] not in found or not isinstance(hashes, str):
            return []
        if shape != (stored if last - first == report.shape[0] else (last - first, report.shape[1])):
            return []
        found[entry["expert"]].append((entry["rows"], _Piece(shard, tensor, None, hashes)))
    pieces = []
    for rows in found.values():
        rows.sort(key=lambda entry: entry[0])
        ends = [0, *(end for (_, end), _ in rows)]
        if [start for (start, _), _ in rows] != ends[:-1] or ends[-1] != report.shape[0]:
            return []
        pieces.append([piece for _, piece in rows])
    return pieces


def _factor(folders: Folders, key: str, problems: list[str]) -> tuple[int, TensorInfo]:
    """File and place of a packed factor, whose bytes are compared with their hash."""
    descriptor, info = folders.written(ADAPTER_WEIGHTS, key)
    if sha256_of(chunks(descriptor, info)) != folders.digest(ADAPTER_WEIGHTS, key):
        problems.append(f"{key}'s bytes are not those that were written")
    return descriptor, info


def _other_factors(A: TensorInfo, B: TensorInfo, report: LayerReport) -> str:
    """Why packed factors cannot be those that the report describes, "" if they can."""
    (out, columns), rank = report.shape, report.rank * len(report.parts)
    for name, info, shape in (("A", A, (rank, columns)), ("B", B, (out, rank))):
        if (info.shape, info.torch_dtype) != (shape, report.dtype):
            return f"{name} is {info.shape} {info.dtype}, not the {shape} {report.dtype} of the report"
    return ""


def _matrices(folders: Folders, pieces: Sequence[_Piece], others: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """One matrix of the original and its residual, as stored; adds what is wrong with the bytes of the latter."""
    weights, residuals = [], []
    for piece in pieces:
        weights.append(piece.read(folders.original(piece.shard, piece.tensor)))
        residuals.append(piece.read(folders.written(piece.shard, piece.tensor)))
        if sha256(bytes_of(residuals[-1])) != piece.sha256:
            whose = "its bytes" if piece.matrix is None else f"the bytes of its matrix {piece.matrix}"
            others.append((piece.tensor, f"{whose} are not those that were written"))
    return (weights[0], residuals[0]) if len(pieces) == 1 else (torch.cat(weights), torch.cat(residuals))


def _is_summary(report: LayerReport) -> bool:
    """Whether the entry of a layer sums up those of its matrices."""
    expected = of_parts(report.name, report.parts, report.seconds)
    found, right = report.certificate, expected.certificate
    return (
        replace(found, energy=right.energy) == right
        and math.isclose(found.energy, right.energy, rel_tol=1e-9)
        and bool(torch.isclose(report.singular_values, expected.singular_values, rtol=1e-6, atol=0).all())
    )


def _together(report: LayerReport, checks: Sequence[LayerCheck], problems: Sequence[str]) -> LayerCheck:
    """The check of a layer, from those of its matrices."""
    captured = sum(float(part.singular_values.double().square().sum()) for part in report.parts)
    whole = sum(
        float(part.singular_values.double().square().sum()) / check.energy if check.energy else frobenius_squared(part)
        for part, check in zip(report.parts, checks, strict=True)
    )
    failed = [check.name for check in checks if check.problem]
    return LayerCheck(
        report.name,
        max(check.reconstruction for check in checks),
        min(1.0, captured / whole) if whole else 1.0,
        max(check.residual for check in checks),
        "; ".join([*problems, *([f"{', '.join(failed[:4])} failed"] if failed else [])]),
        tuple(checks),
    )
