"""The plan that ``pissa-kernels init --dry-run`` prints."""

from __future__ import annotations

from typing import Any

from ..checkpoint.plan import CheckpointJob, TensorJob
from ..checkpoint.weights import Stack, Target
from ..files.header import NAMES
from ..report.tables import text_table

MIB = 2**20


def plan_record(job: CheckpointJob) -> dict[str, Any]:
    """The plan as a JSON object."""
    return {
        "source": str(job.checkpoint.folder),
        "out": str(job.out),
        "bytes": job.size,
        "adapter_bytes": job.adapter_header.size,
        "worker_bytes": job.workspace(),
        "core_seconds": sum(tensor.seconds for tensor in job.tensors),
        "copied": [tensor.info.name for tensor in _copied(job)],
        "quantization": None if job.quantization is None else job.quantization.record(),
        "quantized": [] if job.quantization is None else list(job.quantization.weights),
        "files": list(job.checkpoint.others),
        "left_out": list(job.checkpoint.left_out),
        "layers_left_out": dict(job.adapter.left_out),
        "notes": list(job.notes()),
        "targets": [
            {
                "name": target.name,
                **_places(target),
                "shape": list(target.shape),
                "dtype": NAMES[target.dtype],
                "rank": target.recipe.rank,
                "scaling": target.recipe.scaling,
            }
            for target in job.adapter.targets
        ],
    }


def _places(target: Target | Stack) -> dict[str, Any]:
    """Where the files have a layer."""
    if isinstance(target, Target):
        return {"tensor": target.info.name, "shard": target.shard}
    tensors = {piece.info.name: piece.shard for pieces in target.pieces for piece in pieces}
    return {"experts": len(target.pieces), "tensors": tensors}


def _copied(job: CheckpointJob) -> list[TensorJob]:
    return [tensor for tensor in job.tensors if tensor.target is None and job.quantized(tensor) is None]


def _names(tensor: TensorJob) -> list[tuple[str, str]]:
    return [(shard, info.name) for shard, info in tensor.places]


def plan_text(job: CheckpointJob) -> str:
    """A row for each kind of target, and the sizes."""
    kinds: dict[tuple[str, ...], int] = {}
    for target in job.adapter.targets:
        experts = (len(target.pieces),) if isinstance(target, Stack) else ()
        shape, recipe = "×".join(map(str, (*experts, *target.shape))), target.recipe
        kind = (target.name.rpartition(".")[2], shape, NAMES[target.dtype], str(recipe.rank), f"{recipe.scaling:g}")
        kinds[kind] = kinds.get(kind, 0) + 1
    rows = [[*kind, str(count)] for kind, count in kinds.items()]
    copied = _copied(job)
    residuals = {place for tensor in job.tensors if tensor.target for place in _names(tensor)}
    quantized = []
    if job.quantization is not None:
        number = sum(tensor.target is None and job.quantized(tensor) is not None for tensor in job.tensors)
        scheme = job.quantization.options.scheme.name
        quantized = [f"{scheme}: {len(job.quantization.weights)} weights, {number} of them without an adapter"]
    return "\n".join(
        [
            text_table(["module", "shape", "dtype", "r", "scaling", "layers"], rows, [0, 2]),
            "",
            f"{len(residuals)} tensors become residuals, {len(copied)} are copied "
            f"({sum(tensor.info.nbytes for tensor in copied) / 1e9:.3g} GB), {len(job.checkpoint.others)} other files",
            *quantized,
            f"{job.out} takes {job.size / 1e9:.3g} GB, of which the adapter takes {job.adapter_header.size / MIB:.1f} "
            f"MiB; a worker takes up to {job.workspace() / MIB:.0f} MiB",
            f"about {sum(tensor.seconds for tensor in job.tensors):.0f} s of one core; nothing has been written",
        ]
    )
