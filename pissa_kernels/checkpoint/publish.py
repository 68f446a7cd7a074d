"""The end of a run: collect the journal, write everything that is not a tensor, and publish the result."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import RESUMABLE, copy_file, write_text
from ..files.header import sha256
from ..report import Report
from ..report.layer import layer_from_dict
from .journal import Journal
from .manifest import REPORT, REPORT_DIGEST, Manifest
from .plan import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CheckpointJob, TensorJob
from .targets import LinearWeight
from .worker import Record, Worker


def tensor_key(tensor: TensorJob) -> tuple[str, str]:
    """Shard and name of a tensor."""
    return tensor.shard, tensor.info.name


def by_tensor(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Journal records by shard and name of their tensor."""
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        found[record.get("shard", ""), record.get("tensor", "")].append(record)
    return found


def collect_records(job: CheckpointJob, journal: Journal, *, check: bool) -> dict[tuple[str, str], Record]:
    """One journal record for every tensor.

    Args:
        job, journal: of the run.
        check: whether to hash the bytes of every tensor, where hosts that do not share a page cache have written them.

    Raises:
        RuntimeError: a tensor's bytes do not match its record.
    """
    found = {}
    recorded = by_tensor(journal.records())
    with Worker(job, journal.out, torch.device("cpu")) as worker:
        for tensor in job.tensors:
            records = recorded.get(tensor_key(tensor), [])
            # runs on different machines may have written different bytes: the file holds those of one of them
            if check or len({_digests(record) for record in records}) != 1:
                records = list(filter(worker.holds, records))
            if not records:
                raise RuntimeError(
                    f"{journal.folder}: the bytes of tensor {tensor.info.name!r} are not those that were written; "
                    "--resume writes the tensor again"
                )
            found[tensor_key(tensor)] = records[-1]
    return found


def publish(
    job: CheckpointJob,
    journal: Journal,
    records: dict[tuple[str, str], Record],
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
    for (shard, tensor), record in records.items():
        files[shard]["tensors"].update({tensor: record["sha256"], **record.get("statistics", {})})
        files[ADAPTER_WEIGHTS]["tensors"].update(record.get("adapter", {}))
    for name in job.checkpoint.others:
        if (text := job.texts.get(name)) is None:
            files[name] = {"sha256": copy_file(job.checkpoint.folder / name, out / name)}
        else:
            write_text(out / name, text, suffix=RESUMABLE)
            files[name] = {"sha256": sha256(text.encode())}
    config = {**job.adapter.config, "base_model_name_or_path": job.place}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_text(out / ADAPTER_CONFIG, text, suffix=RESUMABLE)
    files[ADAPTER_CONFIG] = {"sha256": sha256(text.encode())}
    targets = job.adapter.targets
    layers = [layer_from_dict(records[target.shard, target.info.name]["layer"], target.name) for target in targets]
    report = Report(layers=layers, seconds=seconds, peak_extra_bytes=peak_bytes).to_json() + "\n"
    write_text(out / REPORT, report, suffix=RESUMABLE)
    write_text(out / REPORT_DIGEST, f"{sha256(report.encode())}  {Path(REPORT).name}\n", suffix=RESUMABLE)
    quantized = job.quantization.weights.values() if job.quantization else ()
    Manifest(job.record(), files, _layers(targets), _layers(quantized)).write(out)
    journal.check(job)
    journal.publish(replace=replace)


def _layers(weights: Iterable[LinearWeight]) -> dict[str, dict[str, Any]]:
    """The layer of each tensor, for the manifest."""
    return {weight.info.name: {"layer": weight.name, "transposed": weight.transposed} for weight in weights}


def _digests(record: Record) -> str:
    return json.dumps([record.get(key) for key in ("sha256", "statistics", "adapter")], sort_keys=True)
