"""Files that are written past the system's cache where it lets one: whatever the places, the bytes are those."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pissa_kernels.checkpoint import output as module
from pissa_kernels.checkpoint.buffer import BLOCK
from pissa_kernels.checkpoint.output import Output

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


def goes_direct(path: Path) -> bool:
    output = Output(path)
    try:
        return output.takes(memory(4 * BLOCK, 0), 0)
    finally:
        output.close()


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


def test_what_lies_alike_leaves_nothing_in_the_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not goes_direct(file):
        pytest.skip("this file system writes through its cache alone")
    calls: list[tuple[bool, int, int]] = []
    output = Output(file)

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
    code: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not goes_direct(file):
        pytest.skip("this file system writes through its cache alone")
    output, asked = Output(file), []

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
    assert file.read_bytes() == data
    assert asked == [0], "it is asked once"


def test_a_full_disk_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_at", full)
    output = Output(file)
    with pytest.raises(OSError, match="No space left"):
        output.write(memory(4 * BLOCK, 0), 0)
    output.close()


def test_a_file_system_in_memory_takes_it(file: Path) -> None:
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
