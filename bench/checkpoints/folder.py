"""Llama-shaped checkpoints on disk, in the layout of transformers, with the weights of :mod:`bench.models.llama`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pissa_kernels.files.header import Header, TensorInfo, bytes_of, plan_header, read_tensor, write_at

from ..harness import gate
from ..harness.dtypes import DTYPES
from ..models.llama import ModelCase, targets

SHARD_BYTES = 500_000_000
# Standard deviation of the embeddings, as transformers initializes them.
EMBEDDING_STD = 0.02
Declared = tuple[str, torch.dtype, tuple[int, ...]]


def checkpoint_of(case: ModelCase) -> Path:
    """The folder of a case's checkpoint in :data:`bench.harness.gate.CACHE`, written if it does not exist.

    The tensors are written one by one to a folder that is renamed once it is complete.

    Raises:
        OSError: not enough space for the checkpoint and one result.
    """
    shape = f"{case.layers}x{case.width}x{case.inner}-g{case.groups}-{case.dtype}-d{case.distinct}"
    folder = gate.CACHE / f"checkpoint-{shape}"
    if folder.is_dir():
        return folder
    model = case.empty()
    declared = [(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    headers = _shards(declared)
    size = sum(header.size for header in headers.values())
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if shutil.disk_usage(unfinished).free < 2 * size:
        raise OSError(f"not enough space in {gate.CACHE} for a checkpoint of {size / 1e9:.2g} GB and its result")
    _write_tensors(unfinished, headers, case)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = DTYPES[case.dtype]
    model.config.save_pretrained(unfinished)
    listed = {name: shard for shard, header in headers.items() for name in header.tensors}
    index = json.dumps({"metadata": {"total_size": size}, "weight_map": listed}, indent=2)
    (unfinished / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    unfinished.rename(folder)
    return folder


def projections(case: ModelCase) -> dict[str, tuple[int, int]]:
    """Shape (out, in) of every projection by module name, in the order of the model."""
    return {name: (module.out_features, module.in_features) for name, module in targets(case.empty())}


def distinct_projections(case: ModelCase) -> list[str]:
    """The projections whose weights do not repeat those of an earlier layer."""
    names = list(projections(case))
    return names[: case.distinct * len(names) // case.layers or None]


def _shards(declared: list[Declared]) -> dict[str, Header]:
    """Headers by file name: the tensors in order, at most :data:`SHARD_BYTES` per file with more than one."""
    groups: list[list[Declared]] = [[]]
    room = SHARD_BYTES
    for tensor in declared:
        nbytes = tensor[1].itemsize * torch.Size(tensor[2]).numel()
        if nbytes > room and groups[-1]:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(tensor)
        room -= nbytes
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": plan_header(group)
        for number, group in enumerate(groups, start=1)
    }


def _write_tensors(folder: Path, headers: dict[str, Header], case: ModelCase) -> None:
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[int, TensorInfo]] = {}
        for name, header in headers.items():
            file = stack.enter_context((folder / name).open("w+b"))
            os.truncate(file.fileno(), header.size)
            write_at(file.fileno(), memoryview(header.encoded), 0)
            places |= {tensor: (file.fileno(), entry) for tensor, entry in header.tensors.items()}
        for name, source in _sources(case, {name: entry.shape for name, (_, entry) in places.items()}):
            descriptor, entry = places[name]
            tensor = read_tensor(*places[source]) if isinstance(source, str) else source.to(DTYPES[case.dtype])
            write_at(descriptor, bytes_of(tensor.contiguous()), entry.start)


def _sources(case: ModelCase, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor | str]]:
    """Each tensor's name with its values, or with the name of an earlier tensor of the same values."""
    adapted = projections(case)
    modules, own = list(adapted), len(distinct_projections(case))
    for index, (module, shape) in enumerate(adapted.items()):
        yield f"{module}.weight", case.weight(index, module, shape) if index < own else f"{modules[index % own]}.weight"
    generator = torch.Generator().manual_seed(0)
    for name in sorted(shapes.keys() - {f"{module}.weight" for module in modules}):
        norm = len(shapes[name]) == 1
        yield name, torch.ones(shapes[name]) if norm else EMBEDDING_STD * torch.randn(shapes[name], generator=generator)
