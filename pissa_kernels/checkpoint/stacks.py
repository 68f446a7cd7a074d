"""The files of stacks of matrices: where each matrix is written, and the packed factors when all of them are known.

A worker takes one matrix, as it takes any weight. Its rows of the packed A (r·E, in) have their place in the adapter's
file. Its columns of the packed B (out, r·E) are strided there, one element at a time; so its B (out, r) is written to a
file beside the unfinished result, which is deleted with the folder of the run. At the end, one process interleaves all.
That reads what workers have written and changes none of it, so it is repeated after it was interrupted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..files import system
from ..files.header import TensorInfo, bytes_of, chunks, read_into, sha256_of, write_at
from .plan import ADAPTER_WEIGHTS, CheckpointJob
from .weights import Expert, Stack

# In the folder of the run, beside the unfinished result.
STAGED = "factors.safetensors"
# Bytes of a packed B that are interleaved at a time.
PACKED_BYTES = 16 << 20


def expert_places(job: CheckpointJob, expert: Expert) -> list[tuple[str, TensorInfo]]:
    """File and place of what is written of a matrix: the pieces of its residual, A, and B."""
    assert job.staged is not None
    stack, r = expert.stack, expert.recipe.rank
    key_A, _ = stack.keys
    return [
        *expert.places(job.headers),
        (ADAPTER_WEIGHTS, job.adapter_header.tensors[key_A].rows(r * expert.index, r * (expert.index + 1))),
        (STAGED, job.staged.tensors[stack.name].matrix(expert.index)),
    ]


def pack_factors(job: CheckpointJob, folder: Path, out: Path) -> dict[str, str]:
    """Write the packed B of every stack. Returns the hashes of A and B of the stacks, by key.

    Args:
        job: the run.
        folder, out: the folder of the run, and that of the unfinished result.
    """
    if job.staged is None:
        return {}
    hashes: dict[str, str] = {}
    source = system.open_to_read(folder / STAGED)
    target = system.open_to_write(out / ADAPTER_WEIGHTS)
    try:
        for stack in job.stacks:
            info_A, info_B = (job.adapter_header.tensors[key] for key in stack.keys)
            digest, at = hashlib.sha256(), info_B.start
            for rows in _packed_rows(source, job.staged.tensors[stack.name], stack):
                data = bytes_of(rows)
                write_at(target, data, at)
                digest.update(data)
                at += len(data)
            hashes |= {stack.keys[0]: sha256_of(chunks(target, info_A)), stack.keys[1]: digest.hexdigest()}
    finally:
        os.close(source)
        os.close(target)
    return hashes


def _packed_rows(descriptor: int, info: TensorInfo, stack: Stack) -> Iterator[Tensor]:
    """Consecutive rows of the packed B (out, r·E), column k·E + e of which is column k of matrix e."""
    experts, out, rank = info.shape
    step = max(1, PACKED_BYTES // (experts * rank * stack.dtype.itemsize))
    for first in range(0, out, step):
        rows = torch.empty(experts, min(step, out - first), rank, dtype=stack.dtype)
        for index in range(experts):
            place = info.matrix(index).rows(first, first + rows.shape[1])
            read_into(descriptor, bytes_of(rows[index]), place.start)
        yield rows.permute(1, 2, 0).reshape(-1, rank * experts)
