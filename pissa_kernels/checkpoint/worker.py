"""One tensor after another: read, decompose or copy, write in place, say what was written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import layer_context
from ..files import buffer
from ..files.direct import Output
from ..files.header import TensorInfo, bytes_of, chunks, read_tensor, sha256_of, write_at
from ..numerics import exact_arithmetic
from ..pissa import principal_factors
from ..report import LayerReport
from ..report.layer import layer_to_dict
from .plan import ADAPTER_WEIGHTS, CheckpointJob, TensorJob
from .targets import Target

# What a core keeps at hand between writing and digesting.
CACHED_BYTES = 1 << 18
# Bytes that take the disk longer to write than it takes to ask another thread for it.
LARGE_BYTES = 1 << 20
# Written bytes that may wait in the system's cache for it to bring them to the disk by itself.
UNWRITTEN_BYTES = 64 << 20

Record = dict[str, Any]


class Worker:
    """Does items of a plan, from any number of threads.

    Args:
        plan: of the run.
        out: the staged result.
        device: where weights are decomposed.
    """

    def __init__(self, plan: CheckpointJob, out: Path, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self._sources: dict[str, int] = {}
        self._results: dict[str, Output] = {}
        self._out = out
        self._written = 0
        self._unflushed: OSError | None = None
        self._closing = threading.Event()

    def __enter__(self) -> Worker:
        with contextlib.ExitStack() as stack:
            for name in self.plan.headers:
                if name in self.plan.checkpoint.shards:
                    self._sources[name] = os.open(self.plan.checkpoint.folder / name, os.O_RDONLY)
                    stack.callback(os.close, self._sources[name])
                self._results[name] = Output(self._out / name)
                stack.callback(self._results[name].close)
            self._writers = stack.enter_context(ThreadPoolExecutor(thread_name_prefix="pissa_kernels-write"))
            self._opened = stack.pop_all()
        # the disk writes what is done while the next weights are computed, and not all of it at the end
        self._flusher = threading.Thread(target=self._flush, name="pissa_kernels-flush", daemon=True)
        self._flusher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._flusher.join()
        self._opened.close()
        if self._unflushed is not None and exception[0] is None:
            raise self._unflushed

    def will_need(self, tensor_job: TensorJob) -> None:
        """Let the system read an tensor_job's bytes ahead."""
        os.posix_fadvise(
            self._sources[tensor_job.shard], tensor_job.info.start, tensor_job.info.nbytes, os.POSIX_FADV_WILLNEED
        )

    def run(self, tensor_job: TensorJob) -> Record:
        """Copy or decompose one tensor. Returns its journal record.

        Raises:
            OSError: reading or writing failed.
            ValueError, RuntimeError, MemoryError: the weight's values are refused, or there is no memory; with the name
                of the layer or tensor.
        """
        info, target = tensor_job.info, tensor_job.target
        record = {"shard": tensor_job.shard, "tensor": info.name}
        with layer_context(f"tensor {info.name!r}" if target is None else target.label):
            if target is None:
                return {**record, "sha256": self._copy(tensor_job)}
            return {**record, **self._decompose(tensor_job, target)}

    def holds(self, record: Record) -> bool:
        """Whether the staged files have the bytes that a record claims."""
        try:
            entries = [(record["shard"], self.plan.checkpoint.shards[record["shard"]].tensors[record["tensor"]])]
            digests = [record["sha256"]]
            for key, digest in record.get("adapter", {}).items():
                entries.append((ADAPTER_WEIGHTS, self.plan.adapter_header.tensors[key]))
                digests.append(digest)
        except (KeyError, AttributeError, TypeError):
            return False
        return all(
            sha256_of(chunks(self._results[name].descriptor, entry)) == digest
            for (name, entry), digest in zip(entries, digests, strict=True)
        )

    def _copy(self, tensor_job: TensorJob) -> str:
        at, digest = tensor_job.info.start, hashlib.sha256()
        for chunk in chunks(self._sources[tensor_job.shard], tensor_job.info):
            self._write(self._results[tensor_job.shard], chunk, at, digest)
            at += len(chunk)
        return digest.hexdigest()

    def _decompose(self, tensor_job: TensorJob, target: Target) -> Record:
        began = time.perf_counter()
        weight = read_tensor(self._sources[tensor_job.shard], tensor_job.info, buffer.weights).to(self.device)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            factors = principal_factors(weight.mT if target.transposed else weight, target.recipe)
            with exact_arithmetic(self.device):
                ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, target.recipe.scaling, target.transposed)
            written: dict[str, str] = {}
            for key, factor in zip(target.keys, (factors.lora_A, factors.lora_B), strict=True):
                written[key] = self._store(ADAPTER_WEIGHTS, self.plan.adapter_header.tensors[key], factor)
            residual = self._store(tensor_job.shard, tensor_job.info, weight)
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
        )
        return {"sha256": residual, "adapter": written, "layer": layer_to_dict(report)}

    def _store(self, name: str, entry: TensorInfo, tensor: Tensor) -> str:
        if tensor.device.type == "cpu":
            tensor = tensor.to(entry.torch_dtype).contiguous()
        else:  # to where the weight was: it lies there as in the file
            tensor = buffer.weights.take(entry.shape, entry.torch_dtype or tensor.dtype, entry.start).copy_(tensor)
        digest = hashlib.sha256()
        self._write(self._results[name], bytes_of(tensor), entry.start, digest)
        return digest.hexdigest()

    def _write(self, output: Output, data: memoryview, at: int, digest: hashlib._Hash) -> None:
        self._written += len(data)  # a lost update costs nothing but a later flush
        if len(data) >= LARGE_BYTES and output.can_write_directly(data, at):
            written = self._writers.submit(output.write, data, at)
            try:
                digest.update(data)  # while the disk takes it
            finally:
                written.result()  # the memory is the next tensor's
            return
        for start in range(0, len(data), CACHED_BYTES):  # while it is in the core's cache
            part = data[start : start + CACHED_BYTES]
            write_at(output.descriptor, part, at + start)
            digest.update(part)

    def _flush(self) -> None:
        flushed = 0
        while not self._closing.wait(0.2):
            if (written := self._written) - flushed >= UNWRITTEN_BYTES:
                for name in self._results:
                    self._bring_to_disk(name)
                flushed = written

    def _bring_to_disk(self, name: str) -> None:
        try:
            os.fdatasync(self._results[name].descriptor)
        except OSError as error:  # the system tells it once: the sync at the end would hear of nothing
            self._unflushed = OSError(error.errno, error.strerror, str(self._out / name))
