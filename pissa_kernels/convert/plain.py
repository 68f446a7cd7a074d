"""The plain LoRA: its file is laid out first, then written one layer at a time, with its config beside it."""

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
from ..adapter.wrapped import Known
from ..checks import layer_context
from ..files.atomic import write_text
from ..files.destination import check_deletable
from ..files.header import Header, bytes_of, chunks, plan_header, read_header, write_at
from ..files.system import flush
from .adapter import read_adapter
from .layer import Layer
from .lowrank import stacked, truncated
from .pair import AdapterPair
from .report import ConvertedLayer

# Lists of a config that are sets: PEFT saves them in any order.
_SETS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
# In the header of the weights. PEFT's save_pretrained writes another header: an adapter that was trained further in its
# folder is known by that.
MARK = {"written_by": "pissa-kernels convert"}


@dataclass(frozen=True)
class PlainLora:
    """A plain LoRA to be written.

    Attributes:
        pair: the adapters.
        ranks: rank r of each layer in the result's config, by the layer's name.
        truncate: whether the factors are truncated to their ranks. Otherwise they are stacked, and exact.
        header: header of the safetensors file.
    """

    pair: AdapterPair
    ranks: Mapping[str, int]
    truncate: bool
    header: Header


def plan_plain(pair: AdapterPair, rank: int | None) -> PlainLora:
    """Lay out the plain LoRA.

    Args:
        pair: the adapters.
        rank: K; None for 2r.

    Raises:
        ValueError: K is out of range or no rank of a convolution with groups; such a one has DoRA; or a tensor to copy
            has an unknown dtype.
    """
    trained, initial = pair.trained, pair.initial
    highest = 2 * max(layer.rank for layer in trained.layers.values())
    if rank is not None and not 1 <= rank <= highest:
        raise ValueError(f"rank {rank} is out of range; accepted is 1 to {highest}, twice the rank of {trained.path}")
    ranks = {name: min(rank or highest, 2 * layer.rank) for name, layer in trained.layers.items()}
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name, layer in trained.layers.items():
        dtype = (
            torch.float32
            if rank is not None
            else torch.promote_types(layer.dtype, initial.layers.get(name, layer).dtype)
        )
        if layer.packing.groups > 1 and trained.config.get("use_dora"):
            raise ValueError(
                f"layer {name!r} is a convolution with {layer.packing.groups} groups under DoRA, whose norms PEFT "
                "takes of another product than the one that it adds, so that no other factors have them; use it with PEFT"
            )
        if ranks[name] % layer.packing.groups:
            raise ValueError(
                f"layer {name!r} is a convolution with {layer.packing.groups} groups, which PEFT gives ranks that are "
                f"multiples of that, and not {ranks[name]}; give such a rank"
            )
        for info, shape in zip((layer.A, layer.B), layer.packing.shapes(ranks[name], layer.shape), strict=True):
            tensors.append((info.name, dtype, shape))
    for info in trained.others:
        if info.torch_dtype is None:
            raise ValueError(f"{trained.path}: {info.name!r} has dtype {info.dtype}, which this package does not write")
        tensors.append((info.name, info.torch_dtype, info.shape))
    return PlainLora(pair, ranks, truncate=rank is not None, header=plan_header(tensors, MARK))


def check_plain(folder: Path) -> None:
    """Refuse to delete a folder that holds anything but what :func:`write_plain` wrote.

    Raises:
        FileExistsError: the message names what it holds.
    """
    check_deletable(folder, (CONFIG_NAME, WEIGHTS_NAME), "convert")
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise FileExistsError(f"{folder} holds {CONFIG_NAME} without {WEIGHTS_NAME}, which convert does not leave")
    try:
        ours = MARK.items() <= read_header(weights).metadata.items()
    except ValueError:
        ours = False
    if not ours:
        raise FileExistsError(
            f"{weights} is not as convert writes it: it was trained further or saved by another program, and would be "
            "lost; move it away, or choose another folder"
        )


def write_plain(plain: PlainLora, base: str | None, folder: Path) -> tuple[list[ConvertedLayer], float]:
    """Write the config and the weights into an empty folder, and fsync them.

    Args:
        plain: the plain LoRA.
        base: name of the base model for the config; None if it is not known.
        folder: the folder.

    Returns:
        The reports of the layers, and the loss of all layers together.

    Raises:
        OSError: reading or writing failed.
        RuntimeError: PEFT would read another rank or scaling from the config.
    """
    trained = plain.pair.trained
    config = {
        **with_ranks(trained.config, {layer.settings: plain.ranks[name] for name, layer in trained.layers.items()}),
        "init_lora_weights": True,
        "base_model_name_or_path": base,
    }
    write_text(folder / CONFIG_NAME, _config_text(config) + "\n")
    with (folder / WEIGHTS_NAME).open("xb") as file:
        descriptor = file.fileno()
        os.ftruncate(descriptor, plain.header.size)
        write_at(descriptor, memoryview(plain.header.encoded), 0)
        layers, loss = _write_layers(descriptor, plain)
        for info in trained.others:
            at = plain.header.tensors[info.name].start
            for chunk in chunks(plain.pair.trained_descriptor, info):
                write_at(descriptor, chunk, at)
                at += len(chunk)
        os.fsync(descriptor)
    flush(folder)
    _check_written(folder, layers, trained.layers)
    return layers, loss


def _write_layers(descriptor: int, plain: PlainLora) -> tuple[list[ConvertedLayer], float]:
    layers: list[ConvertedLayer] = []
    errors, norms = [], []
    for name, layer in plain.pair.trained.layers.items():
        with layer_context(f"layer {name!r}"):
            error, norm = _write_factors(descriptor, plain, name)
        errors.append(layer.factor * error)
        norms.append(layer.factor * norm)
        parts = layer.packing.parts
        share = _relative(error, norm)
        layers.append(ConvertedLayer(name, layer.shape, plain.ranks[name], layer.scaling, share, parts=parts))
    return layers, _relative(math.hypot(*errors), math.hypot(*norms))


def _write_factors(descriptor: int, plain: PlainLora, name: str) -> tuple[float, float]:
    """Write the factors of one layer. Returns their error, and the norm that it is relative to."""
    factors, layer = plain.pair.read(name), plain.pair.trained.layers[name]
    product = truncated(factors, plain.ranks[name] // layer.packing.groups) if plain.truncate else stacked(factors)
    for info, factor in zip((layer.A, layer.B), layer.packing.join(product.A, product.B), strict=True):
        write_at(descriptor, bytes_of(factor), plain.header.tensors[info.name].start)
    return product.error, product.norm


def _relative(error: float, norm: float) -> float:
    return error / norm if error else 0.0


def _check_written(folder: Path, layers: list[ConvertedLayer], trained: Mapping[str, Layer]) -> None:
    """Check that the config gives each layer its rank and scaling by PEFT's rules."""
    parameters = Known({layer.path: layer.settings for layer in trained.values() if layer.wrapped})
    written = {layer.path: layer for layer in read_adapter(folder, parameters).layers.values()}
    for layer in layers:
        found = written[trained[layer.name].path]
        if found.rank != layer.rank or not same(found.scaling, layer.scaling):
            raise RuntimeError(
                f"layer {layer.name!r}: the new config says rank {found.rank} and scaling {found.scaling}, not "
                f"{layer.rank} and {layer.scaling}; convert with another rank, and report this as a bug"
            )


def _config_text(config: dict[str, Any]) -> str:
    """The config as JSON in a fixed order: keys and sets are sorted, but not patterns, whose first match decides."""
    ordered = {key: config[key] for key in sorted(config)}
    for key in _SETS:
        if isinstance(ordered.get(key), list):
            ordered[key] = sorted(ordered[key])
    return json.dumps(ordered, indent=2)
