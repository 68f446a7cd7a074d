"""The work on single tensors: read from the source, decompose or copy, write in place, hash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import layer_context
from ..factors import Factors
from ..files import buffer, system
from ..files.direct import Output
from ..files.header import TensorInfo, bytes_of, chunks, read_into, read_tensor, sha256_of, write_at
from ..numerics import exact_arithmetic
from ..pissa import principal_factors
from ..quantize.iteration import QuantizedFactors, quantized_factors, quantized_weight
from ..report import LayerReport
from ..report.layer import layer_to_dict
from ..runtime.workers import left_behind
from .fence import Fence
from .plan import ADAPTER_WEIGHTS, CheckpointJob, TensorJob
from .stacks import STAGED, expert_places
from .weights import Expert, LinearWeight, Target

# Bytes that are written and then hashed while they are still in a core's cache.
CACHED_BYTES = 1 << 18
# A smaller write takes less time than handing it to another thread.
LARGE_BYTES = 1 << 20
# Bytes written through the page cache before they are flushed to the disk.
UNWRITTEN_BYTES = 64 << 20

Record = dict[str, Any]


class Worker:
    """Copies, decomposes and quantizes tensors of a checkpoint. Its methods may be called from any number of threads.

    Args:
        job: the checkpoint.
        out: folder of the unfinished result.
        device: where weights are decomposed.
        fence: asked before each write; None for a worker that only reads.
    """

    def __init__(self, job: CheckpointJob, out: Path, device: torch.device, fence: Fence | None = None) -> None:
        self.job, self.device = job, device
        self._fence = fence or Fence(out.parent)
        self._sources: dict[str, int] = {}
        self._results: dict[str, Output] = {}
        self._out = out
        self._written = 0
        self._flush_error: OSError | None = None
        self._closing = threading.Event()

    def __enter__(self) -> Worker:
        with contextlib.ExitStack() as stack:
            for name in self.job.headers:
                if name in self.job.checkpoint.shards:
                    self._sources[name] = system.open_to_read(self.job.checkpoint.folder / name)
                    stack.callback(os.close, self._sources[name])
                self._open(name, self._out / name, stack)
            if self.job.staged is not None:
                self._open(STAGED, self._out.parent / STAGED, stack)
            self._writers = stack.enter_context(ThreadPoolExecutor(thread_name_prefix="pissa_kernels-write"))
            self._opened = stack.pop_all()
        # flush while the next weights are computed, rather than everything in the fsync at the end
        self._flusher = threading.Thread(target=self._flush, name="pissa_kernels-flush", daemon=True)
        self._flusher.start()
        return self

    def _open(self, name: str, path: Path, stack: contextlib.ExitStack) -> None:
        self._results[name] = Output(path)
        stack.callback(self._results[name].close)

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        if left_behind():
            return  # their threads use the files until the process ends
        self._flusher.join()
        self._opened.close()
        if self._flush_error is not None and exception[0] is None:
            raise self._flush_error

    def will_need(self, tensor: TensorJob) -> None:
        """Start reading a tensor of the source into the page cache."""
        for shard, info in tensor.places:
            system.will_need(self._sources[shard], info.start, info.nbytes)

    def run(self, tensor: TensorJob) -> Record:
        """Copy, decompose or quantize one tensor. Returns its journal record.

        Raises:
            OSError: reading or writing failed.
            ValueError, RuntimeError, MemoryError: the weight's values are refused, or memory ran out. The message names
                the layer or the tensor.
        """
        info, target, quantized = tensor.info, tensor.target, self.job.quantized(tensor)
        record: Record = {"shard": tensor.shard, "tensor": info.name}
        layer = target or quantized
        with layer_context(f"tensor {info.name!r}" if layer is None else layer.label):
            if quantized is not None:
                return {**record, **self._quantize(tensor, quantized)}
            if isinstance(target, Expert):
                return {**record, "expert": target.index, **self._decompose_expert(target)}
            if target is not None:
                return {**record, **self._decompose(tensor, target)}
            return {**record, "sha256": self._copy(tensor)}

    def holds(self, tensor: TensorJob, record: Record) -> bool:
        """Whether the bytes in the unfinished result have the hashes of a tensor's journal record."""
        try:
            if isinstance(tensor.target, Expert):
                places = expert_places(self.job, tensor.target)
                hashes = [record["sha256"], *record["others"], *record["factors"]]
                expected = [(*place, sha256) for place, sha256 in zip(places, hashes, strict=True)]
            else:
                expected = self._expected(tensor, record)
        except (KeyError, AttributeError, TypeError, ValueError):
            return False
        return all(sha256_of(chunks(self._results[name].descriptor, info)) == sha256 for name, info, sha256 in expected)

    def _expected(self, tensor: TensorJob, record: Record) -> list[tuple[str, TensorInfo, str]]:
        """File, place and hash of what the record of a tensor says was written."""
        infos = self.job.headers[tensor.shard].tensors
        hashes = {tensor.info.name: record["sha256"], **record.get("statistics", {})}
        expected = [(tensor.shard, infos[name], sha256) for name, sha256 in hashes.items()]
        factors = self.job.adapter_header.tensors
        return expected + [(ADAPTER_WEIGHTS, factors[key], hash_) for key, hash_ in record.get("adapter", {}).items()]

    def _place(self, tensor: TensorJob) -> TensorInfo:
        """Where the tensor is in the result."""
        return self.job.headers[tensor.shard].tensors[tensor.info.name]

    def _copy(self, tensor: TensorJob) -> str:
        at, sha256 = self._place(tensor).start, hashlib.sha256()
        for chunk in chunks(self._sources[tensor.shard], tensor.info):
            self._write(self._results[tensor.shard], chunk, at, sha256)
            at += len(chunk)
        return sha256.hexdigest()

    def _decompose(self, tensor: TensorJob, target: Target) -> Record:
        began = time.perf_counter()
        weight = read_tensor(self._sources[tensor.shard], tensor.info, buffer.weights).to(self.device)
        with self._on_device():
            factors = principal_factors(weight.mT if target.transposed else weight, target.recipe)
            with exact_arithmetic(self.device):
                ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, target.recipe.scaling, target.transposed)
            adapter = self._store_factors(target, factors)
            residual = self._store(tensor.shard, self._place(tensor), weight)
        return {"sha256": residual, "adapter": adapter, "layer": _layer(target, factors, began)}

    def _decompose_expert(self, expert: Expert) -> Record:
        """Decompose one matrix of a stack, and write back its residual in the pieces that the files have."""
        began = time.perf_counter()
        weight = self._read(expert).to(self.device)
        with self._on_device():
            factors = principal_factors(weight.mT if expert.transposed else weight, expert.recipe)
            with exact_arithmetic(self.device):
                ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, expert.recipe.scaling, expert.transposed)
            values = [weight] if len(expert.pieces) == 1 else [weight[slice(*piece.rows)] for piece in expert.pieces]
            values += [factors.lora_A, factors.lora_B]
            # on a GPU all of them are copied into the memory that the weight was read into
            places = expert_places(self.job, expert)
            hashes = [self._store(*place, part) for place, part in zip(places, values, strict=True)]
        return {
            "sha256": hashes[0],
            "others": hashes[1:-2],
            "factors": hashes[-2:],
            "layer": _layer(expert, factors, began),
        }

    def _read(self, expert: Expert) -> Tensor:
        """One matrix of a stack as the file has it, its pieces below one another."""
        first = expert.pieces[0]
        if len(expert.pieces) == 1:
            return read_tensor(self._sources[first.shard], first.info, buffer.weights)
        weight = buffer.weights.take(expert.shape, expert.dtype, first.info.start)
        for piece in expert.pieces:
            read_into(self._sources[piece.shard], bytes_of(weight[slice(*piece.rows)]), piece.info.start)
        return weight

    def _quantize(self, tensor: TensorJob, layer: LinearWeight) -> Record:
        """Quantize the residual of a weight and store its adapter, or quantize the weight of a layer without one."""
        assert self.job.quantization is not None
        assert not isinstance(tensor.target, Expert)  # bitsandbytes quantizes linear layers alone
        began, target, options = time.perf_counter(), tensor.target, self.job.quantization.options
        weight = read_tensor(self._sources[tensor.shard], tensor.info, buffer.weights).to(self.device)
        weight = weight.mT if layer.transposed else weight
        record: Record = {}
        with self._on_device():
            if target is None:
                packed = quantized_weight(weight, options.scheme)
            else:
                factors = quantized_factors(
                    weight, target.recipe, options.scheme, options.iterations, nuclear=options.nuclear
                )
                packed = factors.packed
                record["adapter"] = self._store_factors(target, factors)
                record["layer"] = _layer(target, factors, began)
            hashes = self._store_packed(tensor, layer, packed.tensors())
        return {"sha256": hashes.pop(tensor.info.name), "statistics": hashes, **record}

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _store_factors(self, target: Target, factors: Factors) -> dict[str, str]:
        """Write A and B. Returns the hashes of their bytes, by key."""
        infos = self.job.adapter_header.tensors
        return {
            key: self._store(ADAPTER_WEIGHTS, infos[key], factor)
            for key, factor in zip(target.keys, (factors.lora_A, factors.lora_B), strict=True)
        }

    def _store_packed(self, tensor: TensorJob, layer: LinearWeight, packed: Mapping[str, Tensor]) -> dict[str, str]:
        """Write the tensors of a quantized weight. Returns the hashes of their bytes, by key."""
        assert self.job.quantization is not None
        infos, hashes = self.job.headers[tensor.shard].tensors, {}
        for suffix, planned in self.job.quantization.tensors(layer).items():
            values = packed[suffix]
            if (values.dtype, tuple(values.shape)) != (planned.torch_dtype, planned.shape):
                raise RuntimeError(
                    f"bitsandbytes gives {suffix} {tuple(values.shape)} in {values.dtype}, where {planned.shape} in "
                    f"{planned.torch_dtype} was planned"
                )
            hashes[planned.name] = self._store(tensor.shard, infos[planned.name], values)
        return hashes

    def _store(self, name: str, info: TensorInfo, values: Tensor) -> str:
        """Write a residual or a factor to its place in a file of the result. Returns the SHA-256 of its bytes."""
        if values.device.type == "cpu":
            values = values.to(info.torch_dtype).contiguous()
        else:  # into the memory that the weight was read into, which is aligned for a direct write
            values = buffer.weights.take(info.shape, info.torch_dtype or values.dtype, info.start).copy_(values)
        sha256 = hashlib.sha256()
        self._write(self._results[name], bytes_of(values), info.start, sha256)
        return sha256.hexdigest()

    def _write(self, output: Output, data: memoryview, at: int, sha256: hashlib._Hash) -> None:
        self._fence()
        self._written += len(data)  # an update lost to another thread only delays a flush
        if len(data) >= LARGE_BYTES and output.can_write_directly(data, at):
            writing = self._writers.submit(output.write, data, at)
            try:
                sha256.update(data)  # during the write
            finally:
                writing.result()  # the next tensor is read into the same memory
            return
        for start in range(0, len(data), CACHED_BYTES):
            part = data[start : start + CACHED_BYTES]
            self._fence.in_contact()
            write_at(output.descriptor, part, at + start)
            sha256.update(part)

    def _flush(self) -> None:
        flushed = 0
        while not self._closing.wait(0.2):
            if (written := self._written) - flushed >= UNWRITTEN_BYTES:
                for name in self._results:
                    self._flush_file(name)
                flushed = written

    def _flush_file(self, name: str) -> None:
        try:
            system.flush_contents(self._results[name].descriptor)
        except OSError as error:  # Linux reports a failed write-back once: the fsync at the end would succeed
            self._flush_error = OSError(error.errno, error.strerror, str(self._out / name))


def _layer(target: Target | Expert, factors: Factors, began: float) -> dict[str, Any]:
    """The layer's entry in the report, of work that began at a ``perf_counter``."""
    report = LayerReport(
        name=target.name,
        shape=target.shape,
        rank=target.recipe.rank,
        certificate=factors.certificate,
        seconds=time.perf_counter() - began,
        singular_values=factors.singular_values.cpu(),
        dtype=target.dtype,
        scaling=target.recipe.scaling,
        init=target.recipe.init,
        seed=target.recipe.seed,
        quantization=factors.quantization if isinstance(factors, QuantizedFactors) else None,
    )
    return layer_to_dict(report)
