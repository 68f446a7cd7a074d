"""The original and the result with their open files, as ``verify`` reads them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..files.folder import Checkpoint
from ..files.header import Header, TensorInfo, bytes_of, read_header, read_tensor, sha256
from ..files.system import open_to_read
from ..quantize.scheme import Scheme
from .check_layer import LayerCheck
from .check_quantized import QuantizedCheck
from .findings import Verification
from .manifest import Manifest
from .plan import ADAPTER_WEIGHTS
from .quantization import QuantizationOptions


@dataclass(frozen=True)
class TensorCheck:
    """What a job has found.

    Attributes:
        name: name of the tensor, or of the layer that has several.
        nbytes: bytes that were read of the original.
        problem: what does not hold of it, "" if everything does.
        layer, quantized: check of its layer; None for a tensor that is a copy.
        others: by name of other tensors, what does not hold of them.
    """

    name: str
    nbytes: int
    problem: str
    layer: LayerCheck | None = None
    quantized: QuantizedCheck | None = None
    others: tuple[tuple[str, str], ...] = ()


class Folders:
    """Both folders with their open files.

    A shard whose header is damaged is read with the original's header, or not at all if it holds quantized weights.
    """

    def __init__(self, base: Checkpoint, out: Path, manifest: Manifest, verification: Verification) -> None:
        self.base, self.out, self.manifest = base, out, manifest
        self.verification = verification
        self.headers: dict[str, Header] = {}
        self.descriptors: dict[tuple[bool, str], int] = {}

    def __enter__(self) -> Folders:
        for name, about in self.manifest.files.items():
            path = self.out / name
            if "tensors" not in about or not path.is_file():
                continue
            header = self.base.shards.get(name)
            if header is not None and sha256(header.encoded) != about["header"]:  # of a quantized result
                header = None
            try:
                found = read_header(path)
            except ValueError as error:
                self.verification.note(name, str(error))
            else:
                if sha256(found.encoded) == about["header"]:
                    header = found
                else:
                    self.verification.note(name, "its header is not the one that was written")
            if header is None:
                continue
            self.headers[name] = header
            self.descriptors[False, name] = open_to_read(path)
            if name in self.base.shards:
                self.descriptors[True, name] = open_to_read(self.base.folder / name)
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def written(self, shard: str, tensor: str) -> tuple[int, TensorInfo]:
        """Descriptor and place of a tensor of the result."""
        info = self.headers[shard].tensors.get(tensor)
        if info is None:
            raise ValueError(f"{shard} has no tensor {tensor}")
        return self.descriptors[False, shard], info

    def original(self, shard: str, tensor: str) -> tuple[int, TensorInfo]:
        """Descriptor and place of a tensor of the original."""
        return self.descriptors[True, shard], self.base.shards[shard].tensors[tensor]

    def scheme(self) -> Scheme:
        """The format of the quantized weights."""
        plan = self.manifest.plan["quantization"]
        return QuantizationOptions(plan["kind"], plan["double"], plan["block"]).scheme

    def digest(self, shard: str, tensor: str) -> str:
        """The hash of a tensor in the manifest."""
        return str(self.manifest.files[shard]["tensors"].get(tensor))


def another_kind(written: TensorInfo, original: TensorInfo) -> str:
    """How a tensor of the result differs in dtype or shape from the original's, "" if it does not."""
    if (written.dtype, written.shape) == (original.dtype, original.shape):
        return ""
    return f"is {written.dtype} {written.shape}, not {original.dtype} {original.shape}"


def read_hashed(folders: Folders, shard: str, tensor: str, problems: list[str], checked: str | None = None) -> Tensor:
    """A tensor of the result; adds to ``problems`` if its bytes do not have the hash of the manifest."""
    read = read_tensor(*folders.written(shard, tensor))
    if sha256(bytes_of(read)) != folders.digest(shard, tensor):
        whose = "its" if shard != ADAPTER_WEIGHTS and tensor == (checked or tensor) else f"{tensor}'s"
        problems.append(f"{whose} bytes are not those that were written")
    return read
