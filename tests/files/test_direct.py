"""Writes with O_DIRECT where the file system allows it: the file holds the same bytes either way."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from pissa_kernels.checkpoint import worker as worker_module
from pissa_kernels.checkpoint.journal import Journal
from pissa_kernels.checkpoint.options import AdapterOptions
from pissa_kernels.checkpoint.plan import CheckpointJob, plan_checkpoint
from pissa_kernels.checkpoint.run import run_job
from pissa_kernels.checkpoint.verify import verify_checkpoint
from pissa_kernels.files import direct as module
from pissa_kernels.files.buffer import BLOCK
from pissa_kernels.files.direct import Output

from ..support.checkpoints import save
from ..support.models import build

SIZE = 40 * BLOCK + 77


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of full size, filled with ones."""
    path = tmp_path / "file"
    path.write_bytes(b"\x01" * SIZE)
    return path


def memory(length: int, offset: int, seed: int = 0) -> memoryview:
    """Random bytes at an offset from a multiple of BLOCK in memory."""
    data = memoryview(mmap.mmap(-1, length + 2 * BLOCK))[offset % BLOCK :][:length]
    data[:] = np.random.default_rng(seed).bytes(length)
    return data


@pytest.fixture
def direct(file: Path) -> Path:
    """The file, on a file system that allows O_DIRECT."""
    output, data = Output(file), memory(4 * BLOCK, 0)
    output.write(data, 0)
    allowed = output.can_write_directly(data, 0)  # after a write that may have been refused
    output.close()
    file.write_bytes(b"\x01" * SIZE)
    if not allowed:
        pytest.skip("this file system does not allow O_DIRECT")
    return file


@hypothesis.given(
    at=st.integers(0, SIZE) | st.integers(0, 40).map(lambda block: block * BLOCK),
    length=st.integers(0, SIZE) | st.integers(0, 40).map(lambda blocks: blocks * BLOCK),
    shift=st.sampled_from([0, 0, 8, 512]),
)
@hypothesis.settings(
    max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_only_the_written_bytes_change(file: Path, at: int, length: int, shift: int) -> None:
    data = memory(min(length, SIZE - at), at + shift)
    expected = bytearray(file.read_bytes())
    expected[at : at + len(data)] = data
    output = Output(file)
    try:
        output.write(data, at)
        found = os.pread(output.descriptor, SIZE, 0)  # before the file is closed
    finally:
        output.close()
    assert found == expected
    assert file.read_bytes() == expected


def test_neighbors_are_written_concurrently(file: Path) -> None:
    """Tensors that share blocks, from many threads."""
    ends = [0, 3 * BLOCK + 8, 3 * BLOCK + 16, 9 * BLOCK - 8, 20 * BLOCK + 1000, 33 * BLOCK, SIZE]
    pieces = [memory(stop - start, start, seed=start) for start, stop in itertools.pairwise(ends)]
    for _ in range(20):
        output = Output(file)
        with ThreadPoolExecutor(len(pieces)) as pool:
            list(pool.map(output.write, pieces, ends[:-1]))
        output.close()
        assert file.read_bytes() == b"".join(pieces)
        file.write_bytes(b"\x01" * SIZE)


def test_whole_blocks_are_written_directly(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, int, int]] = []
    output = Output(direct)

    def recorded(descriptor: int, data: memoryview, at: int) -> None:
        calls.append((descriptor == output.descriptor, at, at + len(data)))
        os.pwrite(descriptor, data, at)

    monkeypatch.setattr(module, "write_at", recorded)
    output.write(memory(5 * BLOCK, 100), 100)
    output.close()
    through_cache = [(start, stop) for cached, start, stop in calls if cached]
    assert [(start, stop) for cached, start, stop in calls if not cached] == [(BLOCK, 5 * BLOCK)]
    assert through_cache == [(100, BLOCK), (5 * BLOCK, 5 * BLOCK + 100)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_refused_direct_write_goes_through_the_cache(code: int, direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, tried = Output(direct), []

    def refusing(descriptor: int, data: memoryview, at: int) -> None:
        if descriptor != output.descriptor:
            tried.append(at)
            raise OSError(code, "refused")
        os.pwrite(descriptor, data, at)

    monkeypatch.setattr(module, "write_at", refusing)
    data = memory(SIZE, 0)
    output.write(data, 0)
    output.write(data, 0)
    output.close()
    assert direct.read_bytes() == data
    assert tried == [0], "direct writes are tried once"


def test_full_disk_is_an_error(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(direct)

    def full(descriptor: int, *_: object) -> None:
        if descriptor != output.descriptor:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_at", full)
    with pytest.raises(OSError, match="No space left"):
        output.write(memory(4 * BLOCK, 0), 0)
    output.close()


def test_file_system_in_memory() -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("no file system in memory")
    path = shared / f"pissa_kernels-test-{os.getpid()}"
    path.write_bytes(bytes(SIZE))
    try:
        output = Output(path)
        data = memory(SIZE, 0)
        output.write(data, 0)
        output.close()
        assert path.read_bytes() == data
    finally:
        path.unlink()


def test_too_many_open_files_is_not_an_error(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(direct)
    monkeypatch.setattr(module.os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
    data = memory(SIZE, 0)
    output.write(data, 0)
    output.close()
    assert direct.read_bytes() == data


# In a run


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointJob:
    """The plan for a checkpoint whose weights are all large enough for a direct write."""
    monkeypatch.setattr(worker_module, "LARGE_BYTES", 2 * BLOCK)
    model = save(build("llama", torch.bfloat16, width=64, layers=2), tmp_path / "model", shard="300KB")
    return plan_checkpoint(model, tmp_path / "out", AdapterOptions(rank=4))


def test_memory_is_not_reused_before_it_is_written(planned: CheckpointJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow disk the next weight would be read into it."""
    written, write = [], Output.write

    def slowly(output: Output, data: memoryview, at: int) -> None:
        time.sleep(0.02)
        write(output, data, at)
        written.append(len(data))

    monkeypatch.setattr(Output, "can_write_directly", lambda output, data, at: True)
    monkeypatch.setattr(Output, "write", slowly)
    run_job(planned, workers=2, progress=False)
    assert len(written) > 8
    assert not verify_checkpoint(planned.checkpoint.folder, planned.out, progress=False)


def test_failed_write_ends_the_run(planned: CheckpointJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Output, "can_write_directly", lambda *_: True)
        patch.setattr(Output, "write", full)
        with pytest.raises(OSError, match="No space left"):
            run_job(planned, workers=2, progress=False)
    assert not planned.out.exists()
    run_job(planned, workers=2, progress=False, resume=True)
    assert not verify_checkpoint(planned.checkpoint.folder, planned.out, progress=False)


@pytest.mark.slow
def test_failed_flush_ends_the_run(planned: CheckpointJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reports a failed write-back once, to the first that syncs."""

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def slowly(worker: Any, tensor: Any) -> Any:
        record = run(worker, tensor)
        time.sleep(0.3)
        return record

    run = worker_module.Worker.run
    monkeypatch.setattr(worker_module, "UNWRITTEN_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(worker_module.os, "fdatasync", broken)
        patch.setattr(worker_module.Worker, "run", slowly)
        with pytest.raises(OSError, match=r"Input/output error: '.*\.safetensors'"):
            run_job(planned, workers=2, progress=False)
    assert not planned.out.exists()


def test_no_file_stays_open_where_one_cannot_be_opened(planned: CheckpointJob) -> None:
    journal = Journal(planned.out)
    journal.folder.mkdir()
    journal.begin(planned, replace=False)
    last = list(planned.headers)[-1]
    (journal.out / last).unlink()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError), worker_module.Worker(planned, journal.out, torch.device("cpu")):
        pass
    assert sorted(os.listdir("/proc/self/fd")) == before
