"""Files that are written past the system's cache where it lets one: whatever the places, the bytes are those."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from pissa_kernels.checkpoint import worker as work
from pissa_kernels.checkpoint.journal import Journal
from pissa_kernels.checkpoint.plan import CheckpointJob, plan_checkpoint
from pissa_kernels.checkpoint.run import run_job
from pissa_kernels.checkpoint.targets import AdapterOptions
from pissa_kernels.checkpoint.verify import verify_checkpoint
from pissa_kernels.files import direct as module
from pissa_kernels.files.buffer import BLOCK
from pissa_kernels.files.direct import Output

from ..support.checkpoints import save
from ..support.models import build

SIZE = 40 * BLOCK + 77


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of full size, and of ones."""
    path = tmp_path / "file"
    path.write_bytes(b"\x01" * SIZE)
    return path


def memory(length: int, place: int, seed: int = 0) -> memoryview:
    """Bytes that begin so far after a block's beginning."""
    lying = memoryview(mmap.mmap(-1, length + 2 * BLOCK))[place % BLOCK :][:length]
    lying[:] = np.random.default_rng(seed).bytes(length)
    return lying


@pytest.fixture
def direct(file: Path) -> Path:
    """The file, on a file system that writes past its cache."""
    output, data = Output(file), memory(4 * BLOCK, 0)
    output.write(data, 0)
    went = output.can_write_directly(data, 0)  # it may have been refused
    output.close()
    file.write_bytes(b"\x01" * SIZE)
    if not went:
        pytest.skip("this file system writes through its cache alone")
    return file


@hypothesis.given(
    at=st.integers(0, SIZE) | st.integers(0, 40).map(lambda block: block * BLOCK),
    length=st.integers(0, SIZE) | st.integers(0, 40).map(lambda blocks: blocks * BLOCK),
    shift=st.sampled_from([0, 0, 8, 512]),
)
@hypothesis.settings(
    max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_the_file_is_what_was_written_and_what_was_there(file: Path, at: int, length: int, shift: int) -> None:
    data = memory(min(length, SIZE - at), at + shift)
    expected = bytearray(file.read_bytes())
    expected[at : at + len(data)] = data
    output = Output(file)
    try:
        output.write(data, at)
        found = os.pread(output.descriptor, SIZE, 0)  # before it is closed
    finally:
        output.close()
    assert found == expected
    assert file.read_bytes() == expected


def test_neighbours_are_written_at_once(file: Path) -> None:
    """Tensors that end and begin in one block, from many threads."""
    ends = [0, 3 * BLOCK + 8, 3 * BLOCK + 16, 9 * BLOCK - 8, 20 * BLOCK + 1000, 33 * BLOCK, SIZE]
    pieces = [memory(stop - start, start, seed=start) for start, stop in itertools.pairwise(ends)]
    for _ in range(20):
        output = Output(file)
        with ThreadPoolExecutor(len(pieces)) as pool:
            list(pool.map(output.write, pieces, ends[:-1]))
        output.close()
        assert file.read_bytes() == b"".join(pieces)
        file.write_bytes(b"\x01" * SIZE)


def test_whole_blocks_go_past_the_cache(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, int, int]] = []
    output = Output(direct)

    def noted(descriptor: int, data: memoryview, at: int) -> None:
        calls.append((descriptor == output.descriptor, at, at + len(data)))
        os.pwrite(descriptor, data, at)

    monkeypatch.setattr(module, "write_at", noted)
    output.write(memory(5 * BLOCK, 100), 100)
    output.close()
    through_cache = [(start, stop) for cached, start, stop in calls if cached]
    assert [(start, stop) for cached, start, stop in calls if not cached] == [(BLOCK, 5 * BLOCK)]
    assert through_cache == [(100, BLOCK), (5 * BLOCK, 5 * BLOCK + 100)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_system_that_refuses_gets_it_through_its_cache(
    code: int, direct: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, asked = Output(direct), []

    def refusing(descriptor: int, data: memoryview, at: int) -> None:
        if descriptor != output.descriptor:
            asked.append(at)
            raise OSError(code, "not so")
        os.pwrite(descriptor, data, at)

    monkeypatch.setattr(module, "write_at", refusing)
    data = memory(SIZE, 0)
    output.write(data, 0)
    output.write(data, 0)
    output.close()
    assert direct.read_bytes() == data
    assert asked == [0], "it is asked once"


def test_a_full_disk_is_told(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(direct)

    def full(descriptor: int, *_: object) -> None:
        if descriptor != output.descriptor:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_at", full)
    with pytest.raises(OSError, match="No space left"):
        output.write(memory(4 * BLOCK, 0), 0)
    output.close()


def test_a_file_system_in_memory_takes_it() -> None:
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


def test_no_more_open_files_is_no_failure(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(direct)
    monkeypatch.setattr(module.os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
    data = memory(SIZE, 0)
    output.write(data, 0)
    output.close()
    assert direct.read_bytes() == data


# What a run does with it


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointJob:
    """A checkpoint whose every weight is a large one."""
    monkeypatch.setattr(work, "LARGE_BYTES", 2 * BLOCK)
    model = save(build("llama", torch.bfloat16, width=64, layers=2), tmp_path / "model", shard="300KB")
    return plan_checkpoint(model, tmp_path / "out", AdapterOptions(rank=4))


def test_memory_is_kept_until_it_is_written(planned: CheckpointJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the slowest of disks the next weight would be read over it."""
    wrote, write = [], Output.write

    def slowly(output: Output, data: memoryview, at: int) -> None:
        time.sleep(0.02)
        write(output, data, at)
        wrote.append(len(data))

    monkeypatch.setattr(Output, "can_write_directly", lambda output, data, at: True)
    monkeypatch.setattr(Output, "write", slowly)
    run_job(planned, workers=2, progress=False)
    assert len(wrote) > 8
    assert not verify_checkpoint(planned.checkpoint.folder, planned.out, progress=False)


def test_a_write_that_fails_ends_the_run(planned: CheckpointJob, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_the_flusher_hears_is_not_lost(planned: CheckpointJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system tells once that it could not bring something to the disk."""

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(work, "UNWRITTEN_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(work.os, "fdatasync", broken)
        patch.setattr(work.Worker, "run", lambda *_, run=work.Worker.run: (run(*_), time.sleep(0.3))[0])
        with pytest.raises(OSError, match=r"Input/output error: '.*\.safetensors'"):
            run_job(planned, workers=2, progress=False)
    assert not planned.out.exists()


def test_files_that_cannot_be_opened_leave_none_open(planned: CheckpointJob) -> None:
    staging = Journal(planned.out)
    staging.folder.mkdir()
    staging.begin(planned, replace=False)
    last = list(planned.headers)[-1]
    (staging.out / last).unlink()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError), work.Worker(planned, staging.out, torch.device("cpu")):
        pass
    assert sorted(os.listdir("/proc/self/fd")) == before
