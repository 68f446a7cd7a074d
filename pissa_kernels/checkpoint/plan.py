"""What a run will do, known before it begins: every byte of the result has its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import ops
from .._version import __version__
from ..adapter.names import ADAPTER_FOLDER, CONFIG_NAME, WEIGHTS_NAME
from ..checks import parse_init
from ..files.folder import Checkpoint, open_checkpoint
from ..files.header import Header, TensorInfo, plan_header, sha256
from ..svd.cost import machine_of, plan, workspace
from .targets import Adapter, AdapterOptions, Target, find_targets

ADAPTER_WEIGHTS = f"{ADAPTER_FOLDER}/{WEIGHTS_NAME}"
ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/{CONFIG_NAME}"
# Reading, digesting and writing, in bytes a second. It only has to weigh a copy against a decomposition.
COPIED_PER_SECOND = 5e8


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the checkpoint, to be copied or to become a residual.

    Attributes:
        shard, entry: where it lies, here and there.
        target: None for a copy.
        seconds: what it is expected to take on one core.
    """

    shard: str
    entry: TensorInfo
    target: Target | None
    seconds: float


@dataclass(frozen=True)
class CheckpointJob:
    """One checkpoint's way into another.

    Attributes:
        checkpoint: the source.
        out: the folder to be.
        options: as they were asked for.
        adapter: PEFT's config and the targets.
        adapter_header: of the file with A and B of every target.
        items: every tensor of the source, the longest work first.
        device: "cpu" or "cuda".
    """

    checkpoint: Checkpoint
    out: Path
    options: AdapterOptions
    adapter: Adapter
    adapter_header: Header
    items: tuple[TensorJob, ...]
    device: str

    @property
    def headers(self) -> dict[str, Header]:
        """Of every file that is filled tensor by tensor, by its path in the result."""
        return {**self.checkpoint.shards, ADAPTER_WEIGHTS: self.adapter_header}

    @property
    def size(self) -> int:
        """Bytes of the result's tensors and headers."""
        return sum(header.size for header in self.headers.values())

    def workspace(self) -> int:
        """Bytes that a worker takes at the most: a weight, what its decomposition needs, A and B."""
        return max(
            target.entry.nbytes
            + workspace(*target.shape, target.rank, parse_init(self.options.init), device=_machine(target, self.device))
            for target in self.adapter.targets
        )

    def record(self) -> dict[str, Any]:
        """What has to be the same for a run to go on where another one stopped: it decides every byte.

        In what JSON gives back as it was.
        """
        return {
            "source": str(self.checkpoint.folder.resolve()),
            "fingerprint": self.checkpoint.fingerprint(),
            "out": str(self.out.resolve()),
            "options": json.loads(json.dumps(asdict(self.options))),
            "adapter_header": sha256(self.adapter_header.encoded),
            "device": self.device,
            "products": ops.backend("normal", torch.empty(1, 1, dtype=torch.bfloat16)),
            "package": __version__,
            "torch": str(torch.__version__),
        }

    def share(self, rank: int, world: int) -> list[TensorJob]:
        """One rank's items: the next goes to whoever has least to do so far."""
        loads, shares = [0.0] * world, [[] for _ in range(world)]  # type: ignore[var-annotated]
        for item in self.items:
            least = loads.index(min(loads))
            loads[least] += item.seconds
            shares[least].append(item)
        return shares[rank]


def plan_checkpoint(model: Path, out: Path, options: AdapterOptions, device: str = "cpu") -> CheckpointJob:
    """Look at everything that can be refused before a byte is written.

    Args:
        model: a checkpoint's folder.
        out: the folder to be.
        options: the adapter's.
        device: "cpu" or "cuda", where the weights are decomposed.

    Raises:
        OSError, TypeError, ValueError: as :func:`_open_source` and :func:`find_targets`.
    """
    checkpoint = _open_source(model, out)
    adapter = find_targets(checkpoint, options)
    items = _in_order(checkpoint, adapter.targets, options, device)
    return CheckpointJob(checkpoint, out, options, adapter, _adapter_header(adapter.targets), tuple(items), device)


def _open_source(model: Path, out: Path) -> Checkpoint:
    """The checkpoint of a run to ``out``: what can be refused without asking transformers and PEFT.

    Raises:
        OSError, ValueError: as :func:`open_checkpoint`; a residual, or an ``out`` in ``model``.
    """
    checkpoint = open_checkpoint(model)
    if own := [name for name in checkpoint.others if name.startswith(f"{ADAPTER_FOLDER}/")]:
        raise ValueError(f"{model} is a residual already, as {own[0]} says; take the checkpoint that it was made of")
    if out.resolve() == model.resolve() or model.resolve() in out.resolve().parents:
        raise ValueError(f"OUT {out} is in the source {model}, which is not to be written to")
    return checkpoint


def _in_order(
    checkpoint: Checkpoint, targets: Sequence[Target], options: AdapterOptions, device: str
) -> list[TensorJob]:
    """Every tensor of a checkpoint, of which these are targets, the longest work first."""
    by_tensor = {(target.shard, target.entry.name): target for target in targets}
    items = [
        _item(shard, entry, by_tensor.get((shard, name)), options, device)
        for name, (shard, entry) in checkpoint.tensors().items()
    ]
    return sorted(items, key=lambda item: -item.seconds)


def _item(shard: str, entry: TensorInfo, target: Target | None, options: AdapterOptions, device: str) -> TensorJob:
    seconds = entry.nbytes / COPIED_PER_SECOND
    if target is not None:
        m, n = max(target.shape), min(target.shape)
        seconds += plan(m, n, target.rank, parse_init(options.init), device=_machine(target, device)).seconds
    return TensorJob(shard, entry, target, seconds)


def _machine(target: Target, device: str) -> str:
    return machine_of(torch.empty(1, 1, dtype=target.dtype)) if device == "cpu" else device


def _adapter_header(targets: Sequence[Target]) -> Header:
    tensors = []
    for target in targets:
        out_features, in_features = target.shape
        key_A, key_B = target.keys
        # as PEFT would store them, so that nothing is rounded where they are loaded without a cast to float32
        tensors.append((key_A, target.dtype, (target.rank, in_features)))
        tensors.append((key_B, target.dtype, (out_features, target.rank)))
    return plan_header(tensors)
