"""Where each tensor lies in a safetensors file, and reading and writing it there without loading the others.

The safetensors package reads whole tensors through a memory map and writes whole files from memory. A checkpoint that
is larger than memory needs single tensors at known places; the format makes that easy: eight bytes with the length of
a JSON header, the header, and the tensors one after another (https://github.com/huggingface/safetensors#format).
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
# Headers are padded so that the tensors begin at a multiple of this.
ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: its key.
        dtype: the format's name of it, such as "BF16".
        shape: of the tensor.
        start, stop: its first byte in the file, and the one behind its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def behind(self, header: int) -> Entry:
        """The entry of a file whose header has so many bytes, made from one that counts from the header's end."""
        return replace(self, start=header + self.start, stop=header + self.stop)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None where this version of the package does not know the dtype; such a tensor can be copied all the same."""
        return DTYPES.get(self.dtype)


@dataclass(frozen=True)
class Layout:
    """A file's header, and its tensors in the order in which they lie.

    Attributes:
        header: the bytes before the first tensor, length included.
        entries: by name.
        metadata: the header's strings.
        size: of the file, in bytes.
    """

    header: bytes
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int


def read_layout(path: Path) -> Layout:
    """The layout of a file that is there.

    Raises:
        OSError: it cannot be read.
        ValueError: it is truncated, or its header is not a valid one; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # the format's own package checks the header: offsets without gaps or overlaps, sizes, the file's length
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None
    with path.open("rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
        size = os.fstat(file.fileno()).st_size
    record: dict[str, Any] = json.loads(header[8:])
    metadata = record.pop("__metadata__", {})
    relative = [
        Entry(name, value["dtype"], tuple(value["shape"]), *value["data_offsets"]) for name, value in record.items()
    ]
    relative.sort(key=lambda entry: (entry.start, entry.stop))
    return Layout(header, {entry.name: entry.behind(len(header)) for entry in relative}, metadata, size)


def plan_layout(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Layout:
    """The layout of a file that is to be written, with tensors of these names, dtypes and shapes in this order."""
    metadata = {"format": "pt"}  # without it transformers and PEFT do not take the file
    record: dict[str, Any] = {"__metadata__": metadata}
    relative, offset = [], 0
    # the largest dtype first, so that each tensor is aligned to its own
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
        stop = offset + dtype.itemsize * torch.Size(shape).numel()
        record[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        relative.append(Entry(name, NAMES[dtype], tuple(shape), offset, stop))
        offset = stop
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    entries = {entry.name: entry.behind(len(header)) for entry in relative}
    return Layout(header, entries, metadata, len(header) + offset)


def read_tensor(descriptor: int, entry: Entry, buffer: Buffer | None = None) -> Tensor:
    """One tensor, in memory of its own, or in a buffer's.

    Raises:
        OSError: the file ends before the tensor does.
        TypeError: a dtype that torch does not have.
    """
    dtype = entry.torch_dtype
    if dtype is None:
        raise TypeError(f"tensor {entry.name!r} is {entry.dtype}, which is not read here")
    tensor = torch.empty(entry.shape, dtype=dtype) if buffer is None else buffer.take(entry.shape, dtype, entry.start)
    read_into(descriptor, bytes_of(tensor), entry.start)
    return tensor


def read_into(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a file.

    Raises:
        OSError: the file ends first.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}, {len(buffer) - done} short of a tensor's end")
        done += count


def write_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write all of a buffer into a file.

    Raises:
        OSError: no space, for one.
    """
    done = 0
    while done < len(buffer):
        done += os.pwritev(descriptor, [buffer[done:]], offset + done)


def bytes_of(tensor: Tensor) -> memoryview:
    """The storage of a contiguous tensor on the CPU, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def sha256(data: bytes | memoryview) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(chunks: Iterable[memoryview]) -> str:
    """Hexadecimal SHA-256 of what comes in chunks, each digested before the next is asked for."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


CHUNK_BYTES = 4 << 20


def chunks(descriptor: int, entry: Entry) -> Iterator[memoryview]:
    """A tensor's bytes, a few MiB at a time in one buffer: each is to be used before the next is asked for.

    Raises:
        OSError: the file ends first.
    """
    memory, start = Buffer(), entry.start
    memory.take((min(CHUNK_BYTES, entry.nbytes),), torch.uint8)  # at once what the largest needs
    while start < entry.stop:
        stop = min(entry.stop, start // CHUNK_BYTES * CHUNK_BYTES + CHUNK_BYTES)
        chunk = bytes_of(memory.take((stop - start,), torch.uint8, start))
        read_into(descriptor, chunk, start)
        yield chunk
        start = stop
