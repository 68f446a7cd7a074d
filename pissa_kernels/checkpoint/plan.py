"""The plan of a checkpoint run: every byte of the result has its place before any work is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import ops
from .._version import __version__
from ..adapter.names import ADAPTER_FOLDER, CONFIG_NAME, WEIGHTS_NAME
from ..files.apart import check_apart
from ..files.destination import destination
from ..files.folder import Checkpoint, open_checkpoint
from ..files.header import Header, TensorInfo, plan_header, sha256
from ..files.walk import printable
from ..svd.cost import choose_plan, machine_of, workspace
from .manifest import MANIFEST
from .options import AdapterOptions
from .placement import Placement
from .targets import Adapter, Target, find_targets

ADAPTER_WEIGHTS = f"{ADAPTER_FOLDER}/{WEIGHTS_NAME}"
ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/{CONFIG_NAME}"
# Bytes that are read, hashed and written per second, to weigh a copy against a decomposition.
COPIED_PER_SECOND = 5e8


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the checkpoint, to be copied or to become a residual.

    Attributes:
        shard, info: file and place of the tensor, in the source and in the result.
        target: the layer; None for a copy.
        seconds: estimated time on one core.
    """

    shard: str
    info: TensorInfo
    target: Target | None
    seconds: float


@dataclass(frozen=True)
class CheckpointJob:
    """A checkpoint to be initialized.

    Attributes:
        checkpoint: the source.
        out: the folder of the result.
        options: options of the adapter.
        adapter: PEFT's config and the targets.
        adapter_header: header of the file with A and B of every target.
        tensors: every tensor of the source, the longest work first.
        device: "cpu" or "cuda", where the weights are decomposed.
    """

    checkpoint: Checkpoint
    out: Path
    options: AdapterOptions
    adapter: Adapter
    adapter_header: Header
    tensors: tuple[TensorJob, ...]
    device: str

    @property
    def headers(self) -> dict[str, Header]:
        """Header of every file that is filled tensor by tensor, by its path in the result."""
        return {**self.checkpoint.shards, ADAPTER_WEIGHTS: self.adapter_header}

    @property
    def place(self) -> str:
        """Absolute path of the result."""
        return str(self.out.parent.resolve() / self.out.name)

    @property
    def size(self) -> int:
        """Size in bytes of all safetensors files of the result."""
        return sum(header.size for header in self.headers.values())

    def notes(self) -> tuple[str, ...]:
        """What is left out, and what else a user has to know before the run: one sentence each."""
        files: dict[str, list[str]] = {}
        for name, reason in self.checkpoint.left_out.items():
            files.setdefault(reason, []).append(printable(name))
        return (*(f"left out, as {reason}: {', '.join(names)}" for reason, names in files.items()), *self.adapter.notes)

    def workspace(self) -> int:
        """Upper estimate of the bytes that a worker takes: a weight, the workspace of its SVD, A and B."""
        return max(
            target.info.nbytes
            + workspace(*target.shape, target.recipe.rank, target.recipe.niter, machine=_machine(target, self.device))
            for target in self.adapter.targets
        )

    def record(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result, in JSON types. A run resumes only where all of it agrees."""
        return {
            "source": str(self.checkpoint.folder.resolve()),
            "fingerprint": self.checkpoint.fingerprint(),
            "out": self.place,
            "options": json.loads(json.dumps(asdict(self.options))),
            "adapter_header": sha256(self.adapter_header.encoded),
            "device": self.device,
            "products": ops.backend("normal", torch.empty(1, 1, dtype=torch.bfloat16)),
            "package": __version__,
            "torch": str(torch.__version__),
        }

    def share(self, process: int, world: int) -> list[TensorJob]:
        """The tensors of one process of ``world``. Each tensor goes to the process with the least work so far."""
        loads, shares = [0.0] * world, [[] for _ in range(world)]  # type: ignore[var-annotated]
        for tensor in self.tensors:
            least = loads.index(min(loads))
            loads[least] += tensor.seconds
            shares[least].append(tensor)
        return shares[process]


def plan_checkpoint(model: Path, out: Path, options: AdapterOptions, device: str = "cpu") -> CheckpointJob:
    """Plan a run, and refuse everything that can be refused before a byte is written.

    Args:
        model: folder of the checkpoint.
        out: folder of the result.
        options: options of the adapter.
        device: "cpu" or "cuda", where the weights are decomposed.

    Raises:
        FileExistsError: ``out`` lies in, under or above a file that is read, or in the folder of an unfinished run, or
            it is a file or a link that leads nowhere.
        OSError, TypeError, ValueError: the checkpoint cannot be read, it is a residual already, or as for
            :func:`pissa_kernels.checkpoint.targets.find_targets`.
    """
    checkpoint = _without_adapter(open_checkpoint(model))
    names = (*checkpoint.others, *checkpoint.left_out)
    own = [name for name in names if name.startswith(f"{ADAPTER_FOLDER}/")]
    if own := own or [name for name in names if name == MANIFEST]:  # the adapter may have been moved away
        raise ValueError(f"{model} is a residual already, as {own[0]} says; take the checkpoint that it was made of")
    out = destination(out, may_be_mounted=True)
    placement = Placement(out)
    placement.check_folder()
    check_apart([out, placement.folder], [model])
    adapter = find_targets(checkpoint, options)
    tensors = _in_order(checkpoint, adapter.targets, device)
    return CheckpointJob(checkpoint, out, options, adapter, _adapter_header(adapter.targets), tuple(tensors), device)


def _without_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """Leave out the config of an adapter that is not there: transformers would look for its weights.

    Raises:
        ValueError: the weights are there, so that the model is not only what its own tensors say.
    """
    if not (checkpoint.folder / CONFIG_NAME).is_file():
        return checkpoint
    stem = WEIGHTS_NAME.partition(".")[0]
    if weights := [name for name in checkpoint.left_out if "/" not in name and name.startswith(f"{stem}.")]:
        raise ValueError(
            f"{checkpoint.folder} holds an adapter ({CONFIG_NAME}, {weights[0]}), which transformers loads on top of "
            "the model; merge it (merge_and_unload) and save the model, or move the adapter's files to another folder"
        )
    others = tuple(name for name in checkpoint.others if name != CONFIG_NAME)
    left_out = {
        **checkpoint.left_out,
        CONFIG_NAME: "its adapter has no weights there, which transformers would look for",
    }
    return replace(checkpoint, others=others, left_out=left_out)


def _in_order(checkpoint: Checkpoint, targets: Sequence[Target], device: str) -> list[TensorJob]:
    """Every tensor of a checkpoint, the longest work first."""
    by_tensor = {(target.shard, target.info.name): target for target in targets}
    jobs = [
        _tensor_job(shard, info, by_tensor.get((shard, name)), device)
        for name, (shard, info) in checkpoint.tensors().items()
    ]
    return sorted(jobs, key=lambda job: -job.seconds)


def _tensor_job(shard: str, info: TensorInfo, target: Target | None, device: str) -> TensorJob:
    seconds = info.nbytes / COPIED_PER_SECOND
    if target is not None:
        m, n = max(target.shape), min(target.shape)
        machine = _machine(target, device)
        seconds += choose_plan(m, n, target.recipe.rank, target.recipe.niter, machine=machine).seconds
    return TensorJob(shard, info, target, seconds)


def _machine(target: Target, device: str) -> str:
    return machine_of(torch.empty(1, 1, dtype=target.dtype)) if device == "cpu" else device


def _adapter_header(targets: Sequence[Target]) -> Header:
    tensors = []
    for target in targets:
        out_features, in_features = target.shape
        key_A, key_B = target.keys
        # in the weight's dtype, as PEFT stores them, so that loading without a cast to float32 rounds nothing
        tensors.append((key_A, target.dtype, (target.recipe.rank, in_features)))
        tensors.append((key_B, target.dtype, (out_features, target.recipe.rank)))
    return plan_header(tensors)
