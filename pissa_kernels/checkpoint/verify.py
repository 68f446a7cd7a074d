"""``pissa-kernels verify``: every byte of a result against its digest, every tensor against the original checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapter.names import factor_key
from ..files.atomic import sha256_of_file
from ..files.folder import Checkpoint, files_of, open_checkpoint
from ..files.header import Header, TensorInfo, bytes_of, chunks, read_header, read_tensor, sha256, sha256_of
from ..numerics import UNIT_ROUNDOFF, exact_arithmetic, reconstruction
from ..report import LayerReport, Report
from ..runtime.progress import progress
from ..runtime.workers import run_jobs
from .manifest import MANIFEST, REPORT, REPORT_DIGEST, Manifest
from .plan import ADAPTER_WEIGHTS

# Of sums in float32 of up to 10⁹ squares, in blocks.
ENERGY_ROUNDING = 1e-4
# Of a residual that is measured in float32 once more.
RESIDUAL_ROUNDING = 1e-5


@dataclass(frozen=True)
class LayerCheck:
    """What was found of one residual.

    Attributes:
        name: of the layer.
        reconstruction: worst |W − (W_res + s·B·A)| over what rounding allows; 1 and less holds.
        energy: s²·Σ‖Bᵢ‖²‖Aᵢ‖² / ‖W‖_F², of the factors as they are stored.
        residual: max ‖W·vᵢ − σᵢ·uᵢ‖ or ‖Wᵀ·uᵢ − σᵢ·vᵢ‖, over σ₁, of the same.
        problem: what does not hold; "" for nothing.
    """

    name: str
    reconstruction: float
    energy: float
    residual: float
    problem: str


@dataclass
class Verification:
    """What :func:`verify_checkpoint` found.

    Attributes:
        layers: every residual, in the report's order.
        copied: tensors that are the original's, bit for bit.
        files: other files that are as they were written.
        problems: (where, what), for each thing that is off; none if all holds.
        extra: files that the result did not have when it was written.
    """

    layers: list[LayerCheck] = field(default_factory=list)
    copied: int = 0
    files: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.problems


def verify_checkpoint(base: Path, out: Path, *, workers: int | None = None, shown: bool = True) -> Verification:
    """Read both folders from end to end, a tensor at a time.

    Args:
        base: the original checkpoint.
        out: what ``pissa-kernels init`` made of it.
        workers: threads; by default as many as torch uses.
        shown: a progress bar, where stderr is a terminal.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder that is not there, or was not written by ``init``.
        ValueError: the original is damaged, or the manifest, without which nothing else can be judged.
    """
    checkpoint = open_checkpoint(base)
    if not out.is_dir():
        raise FileNotFoundError(f"{out} does not exist" if not out.exists() else f"{out} is no folder")
    manifest = Manifest.read(out)
    verification = Verification()
    reports = _check_files(checkpoint, out, manifest, verification)
    threads = torch.get_num_threads()
    with _Folders(checkpoint, out, manifest, verification) as folders, exact_arithmetic(torch.device("cpu")):
        jobs = list(_jobs(folders, reports))
        with progress(len(jobs), "verify", unit="tensor", shown=shown) as tick:

            def done(finding: _Finding) -> None:
                tick(finding.name, finding.nbytes)
                if finding.problem:
                    verification.problems.append((finding.name, finding.problem))
                if finding.layer is not None:
                    verification.layers.append(finding.layer)
                elif not finding.problem:
                    verification.copied += 1

            try:
                run_jobs(jobs, workers or threads, done)
            finally:
                torch.set_num_threads(threads)
    order = {name: index for index, name in enumerate(reports)}
    verification.layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    verification.problems.sort()
    return verification


@dataclass(frozen=True)
class _Finding:
    name: str
    nbytes: int
    problem: str
    layer: LayerCheck | None = None


class _Folders:
    """Both folders, their files open. A shard whose header is damaged is read by the original's, which it had."""

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
                self.verification.problems.append((name, str(error)))
            else:
                if sha256(found.encoded) == about["header"]:
                    header = found
                else:
                    self.verification.problems.append((name, "its header is not the one that was written"))
            if header is None:
                continue
            self.headers[name] = header
            self.descriptors[False, name] = os.open(path, os.O_RDONLY)
            if name in self.base.shards:
                self.descriptors[True, name] = os.open(self.base.folder / name, os.O_RDONLY)
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def written(self, shard: str, tensor: str) -> tuple[int, TensorInfo]:
        return self.descriptors[False, shard], self.headers[shard].tensors[tensor]

    def original(self, shard: str, tensor: str) -> tuple[int, TensorInfo]:
        return self.descriptors[True, shard], self.base.shards[shard].tensors[tensor]

    def digest(self, shard: str, tensor: str) -> str:
        return str(self.manifest.files[shard]["tensors"][tensor])


def _check_files(base: Checkpoint, out: Path, manifest: Manifest, verification: Verification) -> dict[str, LayerReport]:
    """Everything that is no tensor; the reports of the layers by name, as far as they can be read."""
    problems = verification.problems
    found = set(files_of(out))
    known = {*manifest.files, MANIFEST, REPORT, REPORT_DIGEST}
    problems += [(name, "is missing") for name in sorted(known - found)]
    verification.extra = sorted(found - known)
    for name, about in manifest.files.items():
        if "tensors" in about or name not in found:
            continue
        if sha256_of_file(out / name) != about["sha256"]:
            problems.append((name, "its bytes are not those that were written"))
        elif name in base.others and sha256_of_file(base.folder / name) != about["sha256"]:
            problems.append((name, f"differs from the file in {base.folder}"))
        else:
            verification.files += 1
    if {REPORT, REPORT_DIGEST} <= found:
        if (out / REPORT_DIGEST).read_bytes() != f"{sha256_of_file(out / REPORT)}  {Path(REPORT).name}\n".encode():
            problems.append((REPORT, f"its bytes do not match {Path(REPORT_DIGEST).name}"))
        else:
            verification.files += 2
            return {layer.name: layer for layer in Report.read(out / REPORT).layers}
    return {}


def _jobs(folders: _Folders, reports: dict[str, LayerReport]) -> Iterator[Callable[[Callable[[_Finding], None]], None]]:
    """A job for each tensor of the original; a target's takes its A and B along."""
    problems = folders.verification.problems
    listed = {
        (shard, tensor)
        for shard, about in folders.manifest.files.items()
        if shard != ADAPTER_WEIGHTS
        for tensor in about.get("tensors", ())
    }
    originals = {(shard, tensor) for tensor, (shard, _) in folders.base.tensors().items()}
    for shard, tensor in sorted(listed ^ originals):
        where = "the original" if (shard, tensor) in listed else "the result's manifest"
        problems.append((tensor, f"is not in {shard} of {where}"))
    for shard, tensor in sorted(listed & originals):
        if shard not in folders.headers:
            continue
        about = folders.manifest.targets.get(tensor)
        if about is None:
            yield partial(_job, tensor, partial(_copied, folders, shard, tensor))
        else:
            layer = reports.get(about["layer"])
            yield partial(_job, tensor, partial(_residual, folders, shard, tensor, about, layer))


def _job(tensor: str, check: Callable[[], _Finding], emit: Callable[[_Finding], None]) -> None:
    torch.set_num_threads(1)  # of this thread alone, except MKL's
    try:
        emit(check())
    except OSError as error:  # a file that ends too soon
        emit(_Finding(tensor, 0, str(error)))


def _copied(folders: _Folders, shard: str, tensor: str) -> _Finding:
    written, original = folders.written(shard, tensor), folders.original(shard, tensor)
    problem = ""
    if (written[1].dtype, written[1].shape) != (original[1].dtype, original[1].shape):
        problem = f"is {written[1].dtype} {written[1].shape}, not {original[1].dtype} {original[1].shape}"
    elif sha256_of(chunks(*written)) != folders.digest(shard, tensor):
        problem = "its bytes are not those that were written"
    elif sha256_of(chunks(*original)) != folders.digest(shard, tensor):
        problem = f"differs from the tensor in {folders.base.folder}"
    return _Finding(tensor, written[1].nbytes, problem)


def _residual(
    folders: _Folders, shard: str, tensor: str, about: Mapping[str, Any], report: LayerReport | None
) -> _Finding:
    descriptor, entry = folders.original(shard, tensor)
    if ADAPTER_WEIGHTS not in folders.headers or report is None:
        missing = REPORT if report is None else ADAPTER_WEIGHTS
        return _Finding(tensor, 0, f"cannot be checked without {missing}")
    problems: list[str] = []
    residual = _read(folders, shard, tensor, problems)
    keys = [factor_key(about["layer"], factor) for factor in "AB"]
    A, B = (_read(folders, ADAPTER_WEIGHTS, key, problems) for key in keys)
    weight = read_tensor(descriptor, entry)
    if about["transposed"]:
        weight, residual = weight.mT, residual.mT
    check = _check_layer(weight, residual, A, B, report)
    problems += [check.problem] if check.problem else []
    return _Finding(tensor, entry.nbytes, "; ".join(problems), check)


def _read(folders: _Folders, shard: str, tensor: str, problems: list[str]) -> Tensor:
    read = read_tensor(*folders.written(shard, tensor))
    if sha256(bytes_of(read)) != folders.digest(shard, tensor):
        whose = "its" if shard != ADAPTER_WEIGHTS else f"{tensor}'s"
        problems.append(f"{whose} bytes are not those that were written")
    return read


def _check_layer(weight: Tensor, residual: Tensor, A: Tensor, B: Tensor, report: LayerReport) -> LayerCheck:
    """The stored triplets against the weight and the certificate, W (out, in)."""
    problems = []
    if (tuple(weight.shape), len(A), weight.dtype) != (report.shape, report.rank, report.dtype):
        found = f"{tuple(weight.shape)} {weight.dtype} of rank {len(A)}"
        return LayerCheck(report.name, torch.inf, 0.0, torch.inf, f"its report is of another weight than {found}")
    worst = reconstruction(weight, residual, A, B, report.scaling)
    if not worst <= 1:
        problems.append(f"W_res + s·B·A is off by {worst:.3g} × what rounding allows")
    u = UNIT_ROUNDOFF[weight.dtype]
    rows, columns = A.double().norm(dim=1), B.double().norm(dim=0)
    sigma = report.scaling * rows * columns
    expected = report.singular_values.double()
    # each element is rounded by u, or, where it is subnormal, by u times the smallest normal number
    tiny = torch.finfo(weight.dtype).smallest_normal * u * max(weight.shape) ** 0.5 * report.scaling
    if not bool(((sigma - expected).abs() <= (2.1 * u + 1e-6) * expected + tiny * (rows + columns)).all()):
        problems.append("s·‖B‖·‖A‖ are not the singular values of its certificate")
    norm = float(sum(weight[row : row + 256].double().square().sum() for row in range(0, len(weight), 256)))
    energy = float(expected.square().sum()) / norm if norm else 1.0
    if not abs(energy - report.certificate.energy) <= ENERGY_ROUNDING * report.certificate.energy:
        problems.append(f"its energy is {energy:.6f}, not the certificate's {report.certificate.energy:.6f}")
    V = (A.double() / rows.clamp_min(1e-300)[:, None]).float().mT.contiguous()
    U = (B.double() / columns.clamp_min(1e-300)).float()
    apart = torch.stack(
        [
            (ops.matmul(weight, V) - U * expected.float()).norm(dim=0),
            (ops.rmatmul(weight, U) - V * expected.float()).norm(dim=0),
        ]
    )
    largest = float(expected[0])
    moved = float(apart.max()) / largest if largest else 0.0
    # rounding turns a unit vector by no more than u, and so moves either side by no more than 2u·σ₁
    if not moved <= report.certificate.residual + 4 * u + RESIDUAL_ROUNDING:
        problems.append(f"its triplets have a residual of {moved:.1e}, above the certificate's")
    return LayerCheck(report.name, worst, energy, moved, "; ".join(problems))
