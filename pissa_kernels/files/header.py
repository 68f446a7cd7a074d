"""Safetensors headers, and single tensors read and written at their place in a file.

The safetensors package reads whole tensors through a memory map and writes whole files from memory. A checkpoint that
is larger than memory needs one tensor at a time at a known offset. The format is simple: eight bytes with the length of
a JSON header (little endian), the header, and the tensors one after another
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .buffer import Buffer
from .recognize import check_readable, not_safetensors
from .system import read_some, write_some

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Headers are padded so that the first tensor starts at a multiple of this.
ALIGNMENT = 8
# Bytes of a tensor that are copied or hashed at a time.
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: key of the tensor.
        dtype: the format's name of the dtype, such as "BF16".
        shape: shape of the tensor.
        start, stop: offset of its first byte in the file, and of the byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def shifted(self, offset: int) -> TensorInfo:
        """The same tensor ``offset`` bytes further into the file."""
        return replace(self, start=offset + self.start, stop=offset + self.stop)

    def rows(self, first: int, last: int) -> TensorInfo:
        """The place of consecutive rows of the tensor, ``last`` not among them; of matrices, if it is a stack."""
        size = self.nbytes // self.shape[0]
        start = self.start + first * size
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, stop=start + (last - first) * size)

    def matrix(self, index: int) -> TensorInfo:
        """The place of one matrix of a stack (E, m, n)."""
        return replace(self.rows(index, index + 1), shape=self.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype; None for one that this package does not know. Such a tensor can still be copied."""
        return DTYPES.get(self.dtype)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        encoded: the bytes before the first tensor, the eight bytes of the length included.
        tensors: by name, in the order of their offsets.
        metadata: strings of the header.
        size: size of the file in bytes.
    """

    encoded: bytes
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int


def read_header(path: Path) -> Header:
    """Read the header of a file.

    Raises:
        OSError: the file cannot be read, or is not a file.
        ValueError: the file is truncated, its header is invalid, or it is something else; the message names the file,
            and what it is.
    """
    from safetensors import SafetensorError, safe_open

    check_readable(path)  # opening a pipe would wait for its other end
    try:
        # the safetensors package validates offsets (no gaps, no overlaps), sizes and the file's length
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        found = not_safetensors(path) or f"damaged or truncated: {error}"
        raise ValueError(f"{path} is {found}") from None
    with path.open("rb") as file:
        length = file.read(8)
        encoded = length + file.read(int.from_bytes(length, "little"))
        size = os.fstat(file.fileno()).st_size
    record: dict[str, Any] = json.loads(encoded[8:])
    metadata = record.pop("__metadata__", {})
    tensors = [
        TensorInfo(name, value["dtype"], tuple(value["shape"]), *value["data_offsets"])
        for name, value in record.items()
    ]
    tensors.sort(key=lambda info: (info.start, info.stop))
    return Header(encoded, {info.name: info.shifted(len(encoded)) for info in tensors}, metadata, size)


def plan_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], marks: Mapping[str, str] | None = None
) -> Header:
    """Header of a file to be written.

    Args:
        tensors: name, dtype and shape of each tensor. Larger dtypes are placed first, which aligns every tensor to its
            own dtype; equal ones keep the given order.
        marks: more strings for the header.
    """
    sizes = [(name, NAMES[dtype], shape, dtype.itemsize * torch.Size(shape).numel()) for name, dtype, shape in tensors]
    return lay_out([TensorInfo(name, dtype, tuple(shape), 0, size) for name, dtype, shape, size in sizes], marks)


def lay_out(tensors: Iterable[TensorInfo], marks: Mapping[str, str] | None = None) -> Header:
    """Header of a file to be written, as of :func:`plan_header`, with tensors of dtypes that torch may not know.

    Args:
        tensors: name, dtype, shape and size of each; where they are elsewhere does not matter.
        marks: more strings for the header.
    """
    metadata = {"format": "pt", **(marks or {})}  # transformers and PEFT refuse a file without the format
    record: dict[str, Any] = {"__metadata__": metadata}
    placed, offset = [], 0
    for info in sorted(tensors, key=lambda info: -(info.nbytes // max(torch.Size(info.shape).numel(), 1))):
        moved = replace(info, start=offset, stop=offset + info.nbytes)
        record[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, moved.stop]}
        placed.append(moved)
        offset = moved.stop
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    encoded = len(text).to_bytes(8, "little") + text
    infos = {info.name: info.shifted(len(encoded)) for info in placed}
    return Header(encoded, infos, metadata, len(encoded) + offset)


def read_tensor(descriptor: int, info: TensorInfo, buffer: Buffer | None = None) -> Tensor:
    """Read one tensor from an open file.

    Args:
        descriptor: file descriptor.
        info: the tensor.
        buffer: memory to read into; None allocates.

    Raises:
        OSError: the file ends before the tensor does.
        TypeError: the dtype is not known.
    """
    dtype = info.torch_dtype
    if dtype is None:
        raise TypeError(f"tensor {info.name!r} has dtype {info.dtype}, which this package does not read")
    tensor = torch.empty(info.shape, dtype=dtype) if buffer is None else buffer.take(info.shape, dtype, info.start)
    read_into(descriptor, bytes_of(tensor), info.start)
    return tensor


def read_into(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` from a file, starting at ``offset``.

    Raises:
        OSError: the file is too short.
    """
    done = 0
    while done < len(buffer):
        count = read_some(descriptor, buffer[done:], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}, {len(buffer) - done} bytes before a tensor does")
        done += count


def write_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write all of ``buffer`` into a file, starting at ``offset``.

    Raises:
        OSError: the file system has no space, for example.
    """
    done = 0
    while done < len(buffer):
        done += write_some(descriptor, buffer[done:], offset + done)


def chunks(descriptor: int, info: TensorInfo) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, :data:`CHUNK_BYTES` at a time. All chunks share one buffer.

    Raises:
        OSError: the file is too short.
    """
    memory, start = Buffer(), info.start
    memory.take((min(CHUNK_BYTES, info.nbytes),), torch.uint8)  # allocate the largest chunk first, so that it is reused
    while start < info.stop:
        stop = min(info.stop, start // CHUNK_BYTES * CHUNK_BYTES + CHUNK_BYTES)
        chunk = bytes_of(memory.take((stop - start,), torch.uint8, start))
        read_into(descriptor, chunk, start)
        yield chunk
        start = stop


def has_hashes(descriptor: int, info: TensorInfo, expected: object) -> bool:
    """Whether a tensor's bytes have the hash, or those of its matrices the hashes, that a manifest has of them."""
    if not isinstance(expected, list):
        return sha256_of(chunks(descriptor, info)) == expected
    parts = [info.matrix(index) for index in range(len(expected))] if len(expected) == info.shape[0] else []
    return bool(parts) and all(
        sha256_of(chunks(descriptor, part)) == one for part, one in zip(parts, expected, strict=True)
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def sha256(data: bytes | memoryview) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(chunks: Iterable[memoryview]) -> str:
    """Hexadecimal SHA-256 of consecutive chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
