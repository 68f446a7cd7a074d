"""``pissa-kernels init``: a checkpoint in, its residual and its adapter out."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import RESUMABLE, copy_file, write_text
from ..files.header import sha256
from ..numerics import exact_arithmetic
from ..report import Report
from ..report.layer import layer_from_dict
from ..runtime.distributed import ProcessGroup, joined
from ..runtime.memory import Peak
from ..runtime.progress import progress
from ..runtime.workers import run_jobs
from .journal import Journal
from .manifest import MANIFEST, REPORT, REPORT_DIGEST, Manifest
from .plan import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CheckpointJob, TensorJob
from .worker import Record, Worker

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        report: of all targets, in the model's order.
        done: tensors that this run did, over all ranks.
        kept: tensors that an earlier run had done.
    """

    report: Report
    done: int
    kept: int


def init_checkpoint(
    plan: CheckpointJob,
    *,
    workers: int | None = None,
    resume: bool = False,
    force: bool = False,
    on_tensor: Callable[[Record], None] | None = None,
    shown: bool = True,
) -> Outcome:
    """Carry out a plan: the result appears at ``plan.out`` as a whole, or not at all.

    Each weight is decomposed by one thread, so the result's bytes depend neither on the number of workers nor on that
    of the ranks; they do on the kind of CPU or GPU. Under torchrun every rank calls this, on a folder that they share.

    Args:
        plan: of :func:`pissa_kernels.checkpoint.plan.plan_checkpoint`.
        workers: threads of this process; by default as many as torch uses, two for a GPU.
        resume: go on with an unfinished run, if there is one.
        force: replace a finished result at the end, and begin an unfinished one again unless ``resume``.
        on_tensor: told of each tensor of this rank, with its journal record.
        shown: a progress bar, where stderr is a terminal.

    Raises:
        FileExistsError: there is a result, or an unfinished one, and neither ``force`` nor ``resume`` says what to do.
        OSError: reading or writing failed; what is done can be resumed, and the source is untouched.
        ValueError: the unfinished run had another plan; or a weight's values are refused, with the layer's name.
    """
    staging = Journal(plan.out)
    with joined() as ranks, contextlib.ExitStack() as lock:
        several_hosts = ranks.on_several_hosts()
        with ranks.together():
            if ranks.first:
                lock.enter_context(staging.locked())
            finished = ranks.first and not _begin(plan, staging, resume, force)
        if any(ranks.gather(finished)):
            return Outcome(Report.read(plan.out / REPORT), 0, len(plan.items))
        began, peak = time.perf_counter(), Peak()
        with ranks.together(), peak:
            kept = _work(plan, staging, ranks, workers, on_tensor, shown)
        kept = sum(ranks.gather(kept))
        with ranks.together():
            if ranks.first:
                records = _records(plan, staging, check=several_hosts)
                # what an earlier run took is not known
                seconds = time.perf_counter() - began if not kept else None
                _finish(plan, staging, records, seconds, peak.extra_bytes)
        return Outcome(Report.read(plan.out / REPORT), len(plan.items) - kept, kept)


def _begin(plan: CheckpointJob, staging: Journal, resume: bool, force: bool) -> bool:
    """Make the staging folder, or see that it can be gone on with; False where there is nothing left to do."""
    unfinished, there = staging.exists(), os.path.lexists(plan.out)
    if unfinished and not (resume or force):
        raise FileExistsError(f"{plan.out} has an unfinished run; --resume goes on with it, --force begins again")
    if unfinished and resume:
        staging.check(plan)
        if not staging.out.exists():  # it was renamed, and then the run was killed
            staging.discard()
            return False
        if there and not (force or staging.replaces()):
            raise FileExistsError(f"{plan.out} exists; --force replaces it")
        staging.lay_out(plan)  # no journal says whether the headers reached the disk
        return True
    if there and not force:
        if resume and (plan.out / MANIFEST).is_file() and Manifest.read(plan.out).plan == plan.record():
            return False
        if not plan.out.is_dir() or any(plan.out.iterdir()):
            raise FileExistsError(f"{plan.out} exists and is not an empty folder; --force replaces it at the end")
    staging.begin(plan, replace=force or there)
    return True


def _work(
    plan: CheckpointJob,
    staging: Journal,
    ranks: ProcessGroup,
    workers: int | None,
    on_tensor: Callable[[Record], None] | None,
    shown: bool,
) -> int:
    """Do this rank's share; the number of tensors in it that had been done."""
    device = CPU if plan.device == "cpu" else torch.device(plan.device, ranks.local % torch.cuda.device_count())
    threads = torch.get_num_threads()
    workers = workers or (threads if device == CPU else 2)
    items = plan.share(ranks.rank, ranks.world)
    claimed = _by_tensor(staging.records())
    kept = 0
    with Worker(plan, staging.out, device) as worker, staging.journal(ranks.rank) as journal:

        def one(index: int, emit: Callable[[tuple[TensorJob, Record, bool]], None]) -> None:
            torch.set_num_threads(1)  # of this thread alone, except MKL's
            item = items[index]
            record = next(filter(worker.holds, claimed.get(_key(item), ())), None)
            if index + workers < len(items):
                worker.will_need(items[index + workers])
            emit((item, record or worker.run(item), record is not None))

        def done(finished: tuple[TensorJob, Record, bool]) -> None:
            nonlocal kept
            item, record, held = finished
            if held:
                kept += 1
            else:
                journal.write(json.dumps(record) + "\n")
                journal.flush()
            tick(item.entry.name, item.entry.nbytes)
            if on_tensor is not None:
                on_tensor({**record, "kept": held})

        jobs = [partial(one, index) for index in range(len(items))]
        with (
            progress(len(items), "PiSSA", unit="tensor", shown=shown and ranks.first) as tick,
            exact_arithmetic(device),
        ):
            try:
                run_jobs(jobs, workers, done)
            finally:
                torch.set_num_threads(threads)  # MKL's number is the process's too
    return kept


def _records(plan: CheckpointJob, staging: Journal, *, check: bool) -> dict[tuple[str, str], Record]:
    """One journal record of every tensor.

    Args:
        plan, staging: of the run.
        check: that the staged bytes are there, as written by machines that do not share a cache.

    Raises:
        RuntimeError: they are not.
    """
    found = {}
    claimed = _by_tensor(staging.records())
    with Worker(plan, staging.out, CPU) as worker:
        for item in plan.items:
            records = claimed.get(_key(item), [])
            # of two runs on different machines the files may hold either one's bytes
            if check or len({_digests(record) for record in records}) != 1:
                records = list(filter(worker.holds, records))
            if not records:
                raise RuntimeError(
                    f"{staging.folder}: the bytes of tensor {item.entry.name!r} are not those that were written; "
                    "--resume does it again"
                )
            found[_key(item)] = records[-1]
    return found


def _finish(
    plan: CheckpointJob,
    staging: Journal,
    records: dict[tuple[str, str], Record],
    seconds: float | None,
    peak_bytes: int | None,
) -> None:
    """Write all that is no tensor, see that the source has not changed meanwhile, and publish."""
    out = staging.out
    files: dict[str, dict[str, Any]] = {
        name: {"header": sha256(header.encoded), "tensors": {}} for name, header in plan.headers.items()
    }
    for (shard, tensor), record in records.items():
        files[shard]["tensors"][tensor] = record["sha256"]
        files[ADAPTER_WEIGHTS]["tensors"].update(record.get("adapter", {}))
    for name in plan.checkpoint.others:
        files[name] = {"sha256": copy_file(plan.checkpoint.folder / name, out / name)}
    config = {**plan.adapter.config, "base_model_name_or_path": str(plan.out.resolve())}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_text(out / ADAPTER_CONFIG, text, suffix=RESUMABLE)
    files[ADAPTER_CONFIG] = {"sha256": sha256(text.encode())}
    layers = [
        layer_from_dict(records[target.shard, target.entry.name]["layer"], target.name)
        for target in plan.adapter.targets
    ]
    report = Report(layers=layers, seconds=seconds, peak_extra_bytes=peak_bytes).to_json() + "\n"
    write_text(out / REPORT, report, suffix=RESUMABLE)
    write_text(out / REPORT_DIGEST, f"{sha256(report.encode())}  {Path(REPORT).name}\n", suffix=RESUMABLE)
    targets = {
        target.entry.name: {"layer": target.name, "transposed": target.transposed} for target in plan.adapter.targets
    }
    Manifest(plan.record(), files, targets).write(out)
    staging.check(plan)
    staging.publish()


def _key(item: TensorJob) -> tuple[str, str]:
    return item.shard, item.entry.name


def _by_tensor(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        found[record.get("shard", ""), record.get("tensor", "")].append(record)
    return found


def _digests(record: Record) -> str:
    return json.dumps([record.get("sha256"), record.get("adapter")], sort_keys=True)
