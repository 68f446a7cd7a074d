"""What ``init_checkpoint`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..report import Report
from .manifest import REPORT
from .plan import CheckpointJob


@dataclass(eq=False, repr=False, kw_only=True)
class CheckpointReport(Report):
    """The report of a checkpoint run.

    Attributes:
        out: folder of the result.
        written: tensors that the run wrote, over all processes.
        kept: tensors that an earlier run had written.
        size: bytes of its safetensors files.
        left_out: files of the source that are not part of the result, such as weights in other formats.
        layers_left_out: layers that "all-linear" leaves out, with the reason.
        notes: what else ``init`` says of the plan on stderr, one sentence each, the files and layers above included.
    """

    out: Path
    written: int
    kept: int
    size: int
    left_out: tuple[str, ...]
    layers_left_out: Mapping[str, str]
    notes: tuple[str, ...]


def checkpoint_report(job: CheckpointJob, kept: int) -> CheckpointReport:
    """The report of a finished run.

    Args:
        job: the run.
        kept: number of tensors that an earlier run had written.
    """
    report = Report.read(job.out / REPORT)
    return CheckpointReport(
        **vars(report),
        out=job.out,
        written=len(job.tensors) - kept,
        kept=kept,
        size=job.size,
        left_out=tuple(job.checkpoint.left_out),
        layers_left_out=dict(job.adapter.left_out),
        notes=job.notes(),
    )
