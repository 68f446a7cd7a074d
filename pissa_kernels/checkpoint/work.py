"""One tensor after another: read, decompose or copy, write in place, say what was written."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..report import LayerReport
from ..report.layer import layer_to_dict
from ..svd import exact_arithmetic
from . import buffer
from .ahead import Ahead
from .layout import Entry, bytes_of, read_into, read_tensor, sha256_of, write_at
from .plan import ADAPTER_WEIGHTS, Item, Plan
from .targets import Target

CHUNK_BYTES = 4 << 20
# What a core keeps at hand between writing and digesting.
CACHED_BYTES = 1 << 18
# Written bytes that may wait for the system to bring them to the disk by itself.
UNWRITTEN_BYTES = 64 << 20

Record = dict[str, Any]


class Worker:
    """Does items of a plan, from any number of threads.

    Args:
        plan: of the run.
        out: the staged result.
        device: where weights are decomposed.
        ahead: what has been decomposed for this plan before.
    """

    def __init__(self, plan: Plan, out: Path, device: torch.device, ahead: Ahead | None = None) -> None:
        self.plan, self.device = plan, device
        self._ahead = ahead
        self._sources: dict[str, int] = {}
        self._results: dict[str, int] = {}
        self._out = out
        self._written = 0
        self._closing = threading.Event()

    def __enter__(self) -> Worker:
        for name in self.plan.layouts:
            if name in self.plan.checkpoint.shards:
                self._sources[name] = os.open(self.plan.checkpoint.folder / name, os.O_RDONLY)
            self._results[name] = os.open(self._out / name, os.O_RDWR)
        # the disk writes what is done while the next weights are computed, and not all of it at the end
        self._flusher = threading.Thread(target=self._flush, name="pissa_kernels-flush", daemon=True)
        self._flusher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._flusher.join()
        for descriptor in (*self._sources.values(), *self._results.values()):
            os.close(descriptor)

    def will_need(self, item: Item) -> None:
        """Let the system read an item's bytes ahead."""
        os.posix_fadvise(self._sources[item.shard], item.entry.start, item.entry.nbytes, os.POSIX_FADV_WILLNEED)

    def run(self, item: Item) -> Record:
        """Do one item; its journal record.

        Raises:
            OSError: reading or writing failed.
            ValueError: NaN or Inf, or a value out of a dtype's range, with the layer's name.
            RuntimeError, MemoryError: with the tensor's name.
        """
        record = {"shard": item.shard, "tensor": item.entry.name}
        try:
            if item.target is None:
                return {**record, "sha256": self._copy(item)}
            return {**record, **self._decompose(item, item.target)}
        except (RuntimeError, MemoryError) as error:
            error.args = (f"tensor {item.entry.name!r}: {error}",)
            raise

    def holds(self, record: Record) -> bool:
        """Whether the staged files have the bytes that a record claims."""
        try:
            entries = [(record["shard"], self.plan.checkpoint.shards[record["shard"]].entries[record["tensor"]])]
            digests = [record["sha256"]]
            for key, digest in record.get("adapter", {}).items():
                entries.append((ADAPTER_WEIGHTS, self.plan.adapter_layout.entries[key]))
                digests.append(digest)
        except (KeyError, AttributeError, TypeError):
            return False
        return all(
            sha256_of(chunks(self._results[name], entry)) == digest
            for (name, entry), digest in zip(entries, digests, strict=True)
        )

    def _copy(self, item: Item) -> str:
        at = item.entry.start

        def copied() -> Iterator[memoryview]:
            nonlocal at
            for chunk in chunks(self._sources[item.shard], item.entry):
                self._write(item.shard, chunk, at)
                at += len(chunk)
                yield chunk

        return sha256_of(copied())

    def _decompose(self, item: Item, target: Target) -> Record:
        known = self._ahead.take(target) if self._ahead is not None else None
        began = time.perf_counter() - (known.seconds if known else 0.0)
        options = self.plan.options
        weight = read_tensor(self._sources[item.shard], item.entry, buffer.weights).to(self.device)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            factors = known.widened() if known else target.factors(weight, options)
            with exact_arithmetic(self.device):
                ops.subtract_lowrank_(weight, factors.lora_B, factors.lora_A, target.scaling, target.transposed)
            written: dict[str, str] = {}
            for key, factor in zip(target.keys, (factors.lora_A, factors.lora_B), strict=True):
                written[key] = self._store(ADAPTER_WEIGHTS, self.plan.adapter_layout.entries[key], factor)
            residual = self._store(item.shard, item.entry, weight)
        report = LayerReport(
            name=target.name,
            shape=target.shape,
            rank=target.rank,
            certificate=factors.certificate,
            seconds=time.perf_counter() - began,
            singular_values=factors.singular_values.cpu(),
            dtype=target.dtype,
            scaling=target.scaling,
            init=options.init,
            seed=options.seed,
        )
        return {"sha256": residual, "adapter": written, "layer": layer_to_dict(report)}

    def _store(self, name: str, entry: Entry, tensor: Tensor) -> str:
        data = bytes_of(tensor.to("cpu", entry.torch_dtype).contiguous())

        def stored() -> Iterator[memoryview]:
            # written and digested a little at a time, while it is in the cache
            for start in range(0, len(data), CACHED_BYTES):
                chunk = data[start : start + CACHED_BYTES]
                self._write(name, chunk, entry.start + start)
                yield chunk

        return sha256_of(stored())

    def _write(self, name: str, data: memoryview, at: int) -> None:
        write_at(self._results[name], data, at)
        self._written += len(data)  # a lost update costs nothing but a later flush

    def _flush(self) -> None:
        flushed = 0
        while not self._closing.wait(0.2):
            if (written := self._written) - flushed >= UNWRITTEN_BYTES:
                for descriptor in self._results.values():
                    with contextlib.suppress(OSError):  # met again by the sync at the end
                        os.fdatasync(descriptor)
                flushed = written


def chunks(descriptor: int, entry: Entry) -> Iterator[memoryview]:
    """A tensor's bytes, a few MiB at a time in one buffer: each is to be used before the next is asked for.

    Raises:
        OSError: the file ends first.
    """
    memory = memoryview(bytearray(min(CHUNK_BYTES, entry.nbytes)))
    for start in range(entry.start, entry.stop, CHUNK_BYTES):
        chunk = memory[: min(CHUNK_BYTES, entry.stop - start)]
        read_into(descriptor, chunk, start)
        yield chunk
