"""The work of a merge on single tensors: copy, or dequantize and add s·B·A, and write in place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..checks import layer_context
from ..convert.layer import Layer
from ..convert.pieces import Piece
from ..files import buffer
from ..files.header import TensorInfo, bytes_of, chunks, read_tensor, write_at
from ..files.system import open_to_read, open_to_write, reserve
from ..numerics import exact_arithmetic
from .plan import MergeJob, Values

CPU = torch.device("cpu")


@dataclass(frozen=True)
class MergeFiles:
    """The open files of a merge. The methods may be called from any number of threads.

    Attributes:
        job: the merge.
        sources: descriptors of the shards of OUT.
        adapter: descriptor of the adapter's weights.
        results: descriptors of the files of the result.
    """

    job: MergeJob
    sources: Mapping[str, int]
    adapter: int
    results: Mapping[str, int]

    def write(self, shard: str, key: str) -> None:
        """Write one tensor to its place.

        Raises:
            OSError: reading or writing failed.
            ValueError: a factor has NaN or Inf, the result exceeds the range of its dtype, or a quantized weight is
                damaged; the message names the layer or the tensor.
        """
        info, values = self.job.headers[shard].tensors[key], self.job.values[key]
        with layer_context(f"tensor {key!r}" if values.layer is None else f"layer {values.layer!r}"):
            source, found = self._source(key, values)
            if values.stored is None and values.layer is None and found.dtype == info.dtype:
                self._copy(shard, info, source, found)
                return
            with exact_arithmetic(CPU):
                result = self._values(key, values, info)
            write_at(self.results[shard], bytes_of(result), info.start)

    def write_stack(self, name: str, keys: Iterable[tuple[str, str]], done: Callable[[str], None]) -> None:
        """Write the tensors of a stack, such as fused experts, one matrix at a time.

        Args:
            name: name of the layer.
            keys: shard and key of each of its tensors.
            done: called with each key when its tensor is written.

        Raises:
            OSError, ValueError: as :meth:`write`.
        """
        layer = self.job.adapter.layers[name]
        with layer_context(f"layer {name!r}"):
            A, B = layer.packing.split(*self._factors(layer))
        for shard, key in keys:
            piece = self.job.values[key].piece
            assert piece is not None  # those of stacks alone are written here
            with layer_context(f"layer {name!r}, tensor {key!r}"), exact_arithmetic(CPU):
                for index in range(len(A)) if piece.expert is None else [piece.expert]:
                    self._write_matrix(shard, key, piece, A[index], piece.rows_of(B[index]), layer.factor, index)
            done(key)

    def _write_matrix(
        self, shard: str, key: str, piece: Piece, A: Tensor, B: Tensor, factor: float, index: int
    ) -> None:
        """Write one matrix of a stack, or the rows of it that a tensor has."""
        values, info = self.job.values[key], self.job.headers[shard].tensors[key]
        dtype = info.torch_dtype
        assert dtype is not None  # the plan refuses others
        if values.stored is not None:
            base = values.stored.read(self._read).dequantize()
        else:
            source, found = self._source(key, values)
            base = read_tensor(source, found.matrix(index) if piece.expert is None else found, buffer.weights)
        base = base if base.dtype == dtype else base.float()
        ops.subtract_lowrank_(base, B.contiguous(), A, -factor, piece.transposed)
        result = _checked(base.to(dtype), info)
        write_at(
            self.results[shard], bytes_of(result), info.matrix(index).start if piece.expert is None else info.start
        )

    def _source(self, key: str, values: Values) -> tuple[int, TensorInfo]:
        """Descriptor and place of a tensor that is not quantized."""
        if values.copy is not None:
            return self.adapter, values.copy
        shard, info = self.job.checkpoint.tensors()[key]
        return self.sources[shard], info

    def _copy(self, shard: str, info: TensorInfo, source: int, found: TensorInfo) -> None:
        at = info.start
        for chunk in chunks(source, found):
            write_at(self.results[shard], chunk, at)
            at += len(chunk)

    def _values(self, key: str, values: Values, info: TensorInfo) -> Tensor:
        """The values of the result: summed in float32, and rounded once."""
        dtype = info.torch_dtype
        assert dtype is not None  # the plan refuses others
        if values.stored is not None:
            base = values.stored.read(self._read).dequantize()
            transposed = False
        else:
            base = read_tensor(*self._source(key, values), buffer.weights)
            transposed = values.transposed
        if values.layer is not None:
            layer = self.job.adapter.layers[values.layer]
            A, B = self._factors(layer)
            base = base if base.dtype == dtype else base.float()
            (A,), (B,) = layer.packing.split(A, B)  # a convolution has the shape of its kernel besides
            ops.subtract_lowrank_(base.flatten(1), B, A, -layer.factor, transposed)
        result = base.to(dtype)
        if values.layer is not None or _finite(base):
            _checked(result, info)
        if values.stored is not None and values.transposed:
            result = result.mT
        return result.contiguous()

    def _read(self, key: str) -> Tensor:
        shard, info = self.job.checkpoint.tensors()[key]
        return read_tensor(self.sources[shard], info)

    def _factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """A and B in float32."""
        factors = [read_tensor(self.adapter, info).float() for info in (layer.A, layer.B)]
        for info, factor in zip((layer.A, layer.B), factors, strict=True):
            if not _finite(factor):
                raise ValueError(f"{info.name!r} in {self.job.adapter.path} has NaN or Inf; take an earlier checkpoint")
        return factors[0], factors[1]


@contextlib.contextmanager
def open_files(job: MergeJob, folder: Path) -> Iterator[MergeFiles]:
    """Make the files of the result at their full size, with their headers, and open all files; fsync them at the end.

    Args:
        job: the merge.
        folder: an empty folder for the result.

    Raises:
        OSError: a file cannot be read or written; there is no space.
    """
    with contextlib.ExitStack() as stack:

        def closing(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        sources = {name: closing(open_to_read(job.checkpoint.folder / name)) for name in job.checkpoint.shards}
        adapter = closing(open_to_read(job.adapter.path))
        results = {}
        for name, header in job.headers.items():
            results[name] = closing(open_to_write(folder / name, os.O_CREAT | os.O_EXCL))
            reserve(results[name], folder / name, header.size)
            write_at(results[name], memoryview(header.encoded), 0)
        yield MergeFiles(job, sources, adapter, results)
        for descriptor in results.values():
            os.fsync(descriptor)


def _checked(result: Tensor, info: TensorInfo) -> Tensor:
    """A result, if it is finite."""
    if not _finite(result):
        raise ValueError(
            f"the result has NaN or Inf in {info.dtype}; the weight has, or its values exceed the range, for which "
            "--dtype bfloat16 is wide enough"
        )
    return result


def _finite(values: Tensor) -> bool:
    """Whether there is no NaN or Inf. ``isfinite`` would take a byte for each element."""
    if not values.numel() or not values.is_floating_point():
        return True
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())
