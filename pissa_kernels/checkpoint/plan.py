"""The plan of a checkpoint run: every byte of the result has its place before any work is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from .cost import COPIED_PER_SECOND, svd_seconds, tensor_seconds, worker_bytes
from .manifest import MANIFEST
from .options import AdapterOptions
from .placement import Placement
from .quantization import QuantizationOptions, QuantizationPlan, plan_quantization
from .quantized_files import quantized_texts, result_header
from .selection import listed
from .targets import Adapter, find_targets
from .weights import Expert, LinearWeight, Stack, Target

ADAPTER_WEIGHTS = f"{ADAPTER_FOLDER}/{WEIGHTS_NAME}"
ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/{CONFIG_NAME}"


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the checkpoint, to be copied, to become a residual, or to be quantized; or one matrix of a stack.

    Attributes:
        shard, info: file and place of the tensor in the source. In the result, the file's header has its place. Of a
            matrix that has several pieces, the first.
        target: the layer, or the matrix of a stack; None for a tensor without an adapter.
        seconds: estimated time on one core.
    """

    shard: str
    info: TensorInfo
    target: Target | Expert | None
    seconds: float

    @property
    def places(self) -> list[tuple[str, TensorInfo]]:
        """File and place in the source of all that is read."""
        if isinstance(self.target, Expert):
            return [(piece.shard, piece.info) for piece in self.target.pieces]
        return [(self.shard, self.info)]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(info.nbytes for _, info in self.places)

    @property
    def key(self) -> tuple[str, str, int | None]:
        """What identifies the job: the file and the name of the tensor, and the number of the matrix."""
        return self.shard, self.info.name, self.target.index if isinstance(self.target, Expert) else None


@dataclass(frozen=True)
class CheckpointJob:
    """A checkpoint to be initialized.

    Attributes:
        checkpoint: the source.
        out: the folder of the result.
        options: options of the adapter.
        adapter: PEFT's config and the targets.
        headers: header of every file that is filled tensor by tensor, by its path in the result.
        staged: header of the file that has the B of every matrix of every stack, until a whole B is known; None without
            stacks.
        texts: contents of files that are not copied as they are, by path.
        quantization: the layers that become quantized; None for a residual in the dtypes of the source.
        tensors: every tensor of the source, or matrix of a stack, the longest work first.
        device: "cpu" or "cuda", where the weights are decomposed.
    """

    checkpoint: Checkpoint
    out: Path
    options: AdapterOptions
    adapter: Adapter
    headers: Mapping[str, Header]
    staged: Header | None
    texts: Mapping[str, str]
    quantization: QuantizationPlan | None
    tensors: tuple[TensorJob, ...]
    device: str

    @property
    def adapter_header(self) -> Header:
        """Header of the file with A and B of every target."""
        return self.headers[ADAPTER_WEIGHTS]

    @property
    def stacks(self) -> list[Stack]:
        """The layers that have several matrices."""
        return [target for target in self.adapter.targets if isinstance(target, Stack)]

    def quantized(self, tensor: TensorJob) -> LinearWeight | None:
        """The layer of a tensor that becomes quantized, None for another."""
        return self.quantization.weights.get(tensor.info.name) if self.quantization else None

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
        quantized = self.quantization.notes if self.quantization else ()
        return (
            *(f"left out, as {reason}: {', '.join(names)}" for reason, names in files.items()),
            *self.adapter.notes,
            *quantized,
        )

    def workspace(self) -> int:
        """Upper estimate of the bytes that a worker takes: a weight, its SVD and its quantization, A and B."""
        return worker_bytes(self.adapter.targets, self.quantization, self.device)

    def record(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result, in JSON types. A run resumes only where all of it agrees."""
        return {
            "source": str(self.checkpoint.folder.resolve()),
            "fingerprint": self.checkpoint.fingerprint(),
            "out": self.place,
            "options": json.loads(json.dumps(asdict(self.options))),
            "adapter_header": sha256(self.adapter_header.encoded),
            "quantization": self.quantization.record() if self.quantization else None,
            "device": self.device,
            "products": ops.backend("normal", torch.empty(1, 1, dtype=torch.bfloat16)),
            "package": __version__,
            "torch": str(torch.__version__),
        }


def plan_checkpoint(
    model: Path,
    out: Path,
    options: AdapterOptions,
    device: str = "cpu",
    quantize: QuantizationOptions | None = None,
) -> CheckpointJob:
    """Plan a run, and refuse everything that can be refused before a byte is written.

    Args:
        model: folder of the checkpoint.
        out: folder of the result.
        options: options of the adapter.
        device: "cpu" or "cuda", where the weights are decomposed.
        quantize: how the residuals are quantized; None leaves them in the dtypes of the source.

    Raises:
        FileExistsError: ``out`` lies in, under or above a file that is read, or in the folder of an unfinished run, or
            it is a file or a link that leads nowhere.
        OSError, TypeError, ValueError: the checkpoint cannot be read, it is a residual already, or as for
            :func:`pissa_kernels.checkpoint.targets.find_targets` and
            :func:`pissa_kernels.checkpoint.quantization.plan_quantization`.
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
    plan = plan_quantization(checkpoint, quantize, options.trust_remote_code) if quantize else None
    if plan is not None:
        # bitsandbytes' layers are stored (out, in), those of Conv1D too
        linear = [target for target in adapter.targets if isinstance(target, Target)]
        stays = any(target.transposed and target.info.name not in plan.weights for target in linear)
        adapter = replace(adapter, config={**adapter.config, "fan_in_fan_out": stays}, notes=_notes(adapter))
    shards = {shard: result_header(header, plan) for shard, header in checkpoint.shards.items()}
    texts = quantized_texts(checkpoint, shards, plan.entries) if plan is not None else {}
    tensors = _in_order(checkpoint, adapter.targets, plan, device)
    headers = {**shards, ADAPTER_WEIGHTS: _adapter_header(adapter.targets)}
    staged = _staged_header([target for target in adapter.targets if isinstance(target, Stack)])
    return CheckpointJob(checkpoint, out, options, adapter, headers, staged, texts, plan, tuple(tensors), device)


def _notes(adapter: Adapter) -> tuple[str, ...]:
    """The notes on an adapter whose linear layers are quantized."""
    stacks = [target.name for target in adapter.targets if isinstance(target, Stack)]
    if not stacks:
        return adapter.notes
    return (*adapter.notes, f"stay in their dtype, as bitsandbytes quantizes linear layers alone: {listed(stacks)}")


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


def _in_order(
    checkpoint: Checkpoint, targets: Sequence[Target | Stack], plan: QuantizationPlan | None, device: str
) -> list[TensorJob]:
    """Every tensor of a checkpoint, or matrix of a stack, the longest work first."""
    by_tensor: dict[tuple[str, str], Target | None] = {}
    jobs = []
    for layer in targets:
        if isinstance(layer, Target):
            by_tensor[layer.shard, layer.info.name] = layer
            continue
        by_tensor |= {(piece.shard, piece.info.name): None for pieces in layer.pieces for piece in pieces}
        seconds = layer.nbytes / len(layer.pieces) / COPIED_PER_SECOND + svd_seconds(layer, device)
        jobs += [TensorJob(expert.pieces[0].shard, expert.pieces[0].info, expert, seconds) for expert in layer.experts]
    for name, (shard, info) in checkpoint.tensors().items():
        target = by_tensor.get((shard, name))
        if target is not None or (shard, name) not in by_tensor:
            jobs.append(TensorJob(shard, info, target, tensor_seconds(info, target, plan, device)))
    return sorted(jobs, key=lambda job: -job.seconds)


def _adapter_header(targets: Sequence[Target | Stack]) -> Header:
    tensors = []
    for target in targets:
        # in the weight's dtype, as PEFT stores them, so that loading without a cast to float32 rounds nothing
        tensors += [(key, target.dtype, shape) for key, shape in zip(target.keys, target.factors, strict=True)]
    return plan_header(tensors)


def _staged_header(stacks: Sequence[Stack]) -> Header | None:
    """Header of a file with (E, out, r) of each stack: the columns of one matrix are strided in the packed B."""
    if not stacks:
        return None
    return plan_header(
        [(stack.name, stack.dtype, (len(stack.pieces), stack.shape[0], stack.recipe.rank)) for stack in stacks]
    )
