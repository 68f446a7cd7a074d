"""The plain LoRA as it is written: where each tensor lies, its factors one layer at a time, and its config."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapter.names import CONFIG_NAME, WEIGHTS_NAME
from ..adapter.patterns import same, with_ranks
from ..files.atomic import fsync, write_text
from ..files.header import Header, bytes_of, chunks, plan_header, write_at
from . import lowrank
from .adapter import Layer, read_adapter
from .pair import Pair

# PEFT holds these as sets and saves them in any order. The order of other lists means something.
_SETS = ("target_modules", "exclude_modules", "modules_to_save")


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer of the result.

    Attributes:
        name: the module's, in the base model.
        shape: (out, in).
        rank: r of the result.
        scaling: s, which is that of the trained adapter.
        loss: ‖ΔW − ΔW_K‖_F / ‖ΔW‖_F; 0 at full rank, and where nothing was trained.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    loss: float


@dataclass(frozen=True)
class Plain:
    """What is to be written.

    Attributes:
        pair: of the adapters.
        ranks: of each layer of the result.
        recompressed: the factors are those of a lower rank, else both pairs of them, stacked.
        header: of the weights.
    """

    pair: Pair
    ranks: Mapping[str, int]
    recompressed: bool
    header: Header


def plan_plain(pair: Pair, rank: int | None) -> Plain:
    """What a conversion will write.

    Args:
        pair: of the adapters.
        rank: K, or None for 2r.

    Raises:
        ValueError: K is out of range, or a tensor to carry over has a dtype that is not known.
    """
    trained, initial = pair.trained, pair.initial
    highest = 2 * max(layer.rank for layer in trained.layers.values())
    if rank is not None and not 1 <= rank <= highest:
        raise ValueError(f"rank {rank} is out of range; accepted is 1 to {highest}, twice that of {trained.path}")
    ranks = {name: min(rank or highest, 2 * layer.rank) for name, layer in trained.layers.items()}
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name, layer in trained.layers.items():
        dtype = torch.float32 if rank is not None else torch.promote_types(layer.dtype, initial.layers[name].dtype)
        tensors.append((layer.A.name, dtype, (ranks[name], layer.shape[1])))
        tensors.append((layer.B.name, dtype, (layer.shape[0], ranks[name])))
    for entry in trained.others:
        if entry.torch_dtype is None:
            raise ValueError(f"{trained.path}: {entry.name!r} is {entry.dtype}, which is not written here")
        tensors.append((entry.name, entry.torch_dtype, entry.shape))
    return Plain(pair, ranks, rank is not None, plan_header(tensors))


def write_plain(plain: Plain, base: str | None, folder: Path) -> tuple[list[ConvertedLayer], float]:
    """Write config and weights into a folder, down to the disk.

    Args:
        plain: what to write.
        base: the base model's name.
        folder: an empty one.

    Returns:
        Its layers, and the loss of all of them together.

    Raises:
        OSError: reading or writing failed.
        RuntimeError: the config does not say what it has to.
    """
    trained = plain.pair.trained
    config = {
        **with_ranks(trained.config, plain.ranks),
        "init_lora_weights": True,
        "base_model_name_or_path": base,
    }
    write_text(folder / CONFIG_NAME, _config_text(config) + "\n")
    descriptor = os.open(folder / WEIGHTS_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.ftruncate(descriptor, plain.header.size)
        write_at(descriptor, memoryview(plain.header.encoded), 0)
        layers, loss = _write_factors(descriptor, plain)
        for entry in trained.others:
            at = plain.header.tensors[entry.name].start
            for chunk in chunks(plain.pair.descriptors[0], entry):
                write_at(descriptor, chunk, at)
                at += len(chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fsync(folder)
    _check_written(folder, layers)
    return layers, loss


def _write_factors(descriptor: int, plain: Plain) -> tuple[list[ConvertedLayer], float]:
    layers: list[ConvertedLayer] = []
    norms, losses = [], []
    for name, layer in plain.pair.trained.layers.items():
        norm, lost = _write_layer(descriptor, plain, name, layer)
        norms.append(layer.scaling * norm)
        losses.append(layer.scaling * lost)
        layers.append(ConvertedLayer(name, layer.shape, plain.ranks[name], layer.scaling, _ratio(lost, norm)))
    return layers, _ratio(math.hypot(*losses), math.hypot(*norms))


def _write_layer(descriptor: int, plain: Plain, name: str, layer: Layer) -> tuple[float, float]:
    """Write one layer's factors; the norm of what they stand for, and of what they leave out of it."""
    factors = plain.pair.read(name)
    product = lowrank.best(factors, plain.ranks[name]) if plain.recompressed else lowrank.whole(factors)
    for entry, factor in ((layer.A, product.A), (layer.B, product.B)):
        write_at(descriptor, bytes_of(factor), plain.header.tensors[entry.name].start)
    return product.norm, product.lost


def _ratio(lost: float, norm: float) -> float:
    return lost / norm if lost else 0.0


def _check_written(folder: Path, layers: list[ConvertedLayer]) -> None:
    """Read the result as PEFT will, and see that each layer has its rank and scaling."""
    written = read_adapter(folder).layers
    for layer in layers:
        found = written[layer.name]
        if found.rank != layer.rank or not same(found.scaling, layer.scaling):
            raise RuntimeError(
                f"layer {layer.name!r} would be loaded with rank {found.rank} and scaling {found.scaling}, not "
                f"{layer.rank} and {layer.scaling}"
            )


def _config_text(config: dict[str, Any]) -> str:
    """JSON in one order: keys and sets sorted, but the patterns' keys, of which the first that matches decides."""
    ordered = {key: config[key] for key in sorted(config)}
    for key in _SETS:
        if isinstance(ordered.get(key), list):
            ordered[key] = sorted(ordered[key])
    return json.dumps(ordered, indent=2)
