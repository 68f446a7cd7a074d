"""The end of a run: collect the journal, write everything that is not a tensor, and publish the result."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import RESUMABLE, copy_file, write_text
from ..files.header import sha256
from ..report import LayerReport, Report
from ..report.layer import layer_from_dict, of_parts
from .journal import Journal
from .manifest import REPORT, REPORT_DIGEST, Manifest
from .plan import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CheckpointJob
from .stacks import pack_factors
from .weights import LinearWeight, Stack, Target
from .worker import Record, Worker

# Shard and name of a tensor, and the number of a matrix of a stack.
Key = tuple[str, str, int | None]


def by_tensor(records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Journal records by their tensor or matrix."""
    found: dict[Key, list[Record]] = defaultdict(list)
    for record in records:
        found[record.get("shard", ""), record.get("tensor", ""), record.get("expert")].append(record)
    return found


def collect_records(job: CheckpointJob, journal: Journal) -> dict[Key, Record]:
    """One journal record for every tensor.

    The bytes of every tensor are hashed where hosts that do not share a page cache have written them.

    Args:
        job, journal: of the run.

    Raises:
        RuntimeError: a tensor's bytes do not match its record.
    """
    found = {}
    recorded = by_tensor(journal.records())
    with Worker(job, journal.out, torch.device("cpu")) as worker:
        for tensor in job.tensors:
            records = recorded.get(tensor.key, [])
            # runs on different machines may have written different bytes: the file holds those of one of them
            if journal.several_hosts or len({_digests(record) for record in records}) != 1:
                journal.fence.in_contact()
                records = [record for record in records if worker.holds(tensor, record)]
            if not records:
                raise RuntimeError(
                    f"{journal.folder}: the bytes of tensor {tensor.info.name!r} are not those that were written; "
                    "--resume writes the tensor again"
                )
            found[tensor.key] = records[-1]
    return found


def publish(
    job: CheckpointJob,
    journal: Journal,
    records: dict[Key, Record],
    seconds: float | None,
    peak_bytes: int | None,
    *,
    replace: bool = False,
) -> None:
    """Write config, report and manifest, check that the source has not changed, and rename the result to its place."""
    out = journal.out
    files: dict[str, dict[str, Any]] = {
        name: {"header": sha256(header.encoded), "tensors": {}} for name, header in job.headers.items()
    }
    for (shard, tensor, expert), record in records.items():
        if expert is None:
            files[shard]["tensors"].update({tensor: record["sha256"], **record.get("statistics", {})})
            files[ADAPTER_WEIGHTS]["tensors"].update(record.get("adapter", {}))
    for stack in job.stacks:
        _add_hashes(files, stack, [records[key] for key in _keys(stack)])
    journal.fence()
    files[ADAPTER_WEIGHTS]["tensors"].update(pack_factors(job, journal.folder, out))
    for name in job.checkpoint.others:
        journal.fence()
        if (text := job.texts.get(name)) is None:
            files[name] = {"sha256": copy_file(job.checkpoint.folder / name, out / name)}
        else:
            write_text(out / name, text, suffix=RESUMABLE)
            files[name] = {"sha256": sha256(text.encode())}
    journal.fence()
    config = {**job.adapter.config, "base_model_name_or_path": job.place}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_text(out / ADAPTER_CONFIG, text, suffix=RESUMABLE)
    files[ADAPTER_CONFIG] = {"sha256": sha256(text.encode())}
    targets = job.adapter.targets
    layers = [_layer(target, records) for target in targets]
    report = Report(layers=layers, seconds=seconds, peak_extra_bytes=peak_bytes).to_json() + "\n"
    write_text(out / REPORT, report, suffix=RESUMABLE)
    write_text(out / REPORT_DIGEST, f"{sha256(report.encode())}  {Path(REPORT).name}\n", suffix=RESUMABLE)
    quantized = job.quantization.weights.values() if job.quantization else ()
    Manifest(job.record(), files, _layers(targets), _layers(quantized)).write(out)
    journal.check(job)
    journal.publish(replace=replace)


def _keys(stack: Stack) -> list[Key]:
    """The keys of a stack's matrices, in order."""
    firsts = [pieces[0] for pieces in stack.pieces]
    return [(first.shard, first.info.name, index) for index, first in enumerate(firsts)]


def _add_hashes(files: dict[str, dict[str, Any]], stack: Stack, records: Sequence[Record]) -> None:
    """Add the hashes of a stack's tensors: a list of one for each matrix, if one tensor is the whole stack."""
    if stack.fused:
        first = stack.pieces[0][0]
        files[first.shard]["tensors"][first.info.name] = [record["sha256"] for record in records]
        return
    for pieces, record in zip(stack.pieces, records, strict=True):
        for piece, sha256_ in zip(pieces, (record["sha256"], *record["others"]), strict=True):
            files[piece.shard]["tensors"][piece.info.name] = sha256_


def _layer(target: Target | Stack, records: dict[Key, Record]) -> LayerReport:
    """The report of a layer."""
    if isinstance(target, Target):
        return layer_from_dict(records[target.shard, target.info.name, None]["layer"], target.name)
    parts = [layer_from_dict(records[key]["layer"], target.name) for key in _keys(target)]
    return of_parts(target.name, parts, sum(part.seconds for part in parts))


def _layers(weights: Iterable[LinearWeight | Stack]) -> dict[str, dict[str, Any]]:
    """The layer of each tensor, for the manifest."""
    found: dict[str, dict[str, Any]] = {}
    for weight in weights:
        about: dict[str, Any] = {"layer": weight.name, "transposed": weight.transposed}
        if isinstance(weight, LinearWeight):
            found[weight.info.name] = about
            continue
        about["key"] = weight.module
        if weight.fused:
            found[weight.pieces[0][0].info.name] = {**about, "experts": len(weight.pieces)}
            continue
        for expert in weight.experts:
            for piece in expert.pieces:
                found[piece.info.name] = {**about, "expert": expert.index, "rows": list(piece.rows)}
    return found


def _digests(record: Record) -> str:
    kept = ("sha256", "statistics", "adapter", "others", "factors")
    return json.dumps([record.get(key) for key in kept], sort_keys=True)
