"""The calls that some systems lack: without them the same bytes are read and written, and every command works."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pissa_kernels.files import system

# What Windows does not have, and the links and direct writes of others.
LINUX_ONLY = [
    *("fork", "forkpty", "sysconf", "symlink", "link", "readlink", "sched_getaffinity"),
    *("pread", "preadv", "pwrite", "pwritev", "fdatasync", "O_DIRECT", "sync"),
    *(name for name in dir(os) if name.startswith(("posix_", "POSIX_FADV"))),
]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LINUX_ONLY:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(system, "fcntl", None)


@pytest.mark.usefixtures("elsewhere")
def test_threads_read_and_write_at_their_offsets(tmp_path: Path) -> None:
    """Without pread and pwrite, threads share the offset of a file."""
    path, size, parts = tmp_path / "file", 1 << 14, 64
    data = np.random.default_rng(0).bytes(size * parts)
    descriptor = system.open_to_write(path, os.O_CREAT)
    system.reserve(descriptor, path, len(data))
    found = [bytearray(size) for _ in range(parts)]

    def write_then_read(part: int) -> None:
        at = part * size
        assert system.write_some(descriptor, memoryview(data)[at : at + size], at) == size
        assert system.read_some(descriptor, memoryview(found[part]), at) == size

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_then_read, range(parts)))
    assert system.read_some(descriptor, memoryview(bytearray(1)), len(data)) == 0
    os.close(descriptor)
    assert path.read_bytes() == data == b"".join(found)


@pytest.mark.parametrize("lacks", ["nothing", "posix_fallocate", "support in the file system"])
def test_reserved_space_keeps_contents(lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if lacks == "posix_fallocate":
        monkeypatch.delattr(os, "posix_fallocate")
    elif lacks != "nothing":
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    descriptor = system.open_to_write(path)
    system.reserve(descriptor, path, 1000)
    system.reserve(descriptor, path, 10)  # never shorter
    os.close(descriptor)
    assert path.read_bytes() == b"abc" + bytes(997)


@pytest.mark.usefixtures("elsewhere")
def test_no_space_without_posix_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    descriptor = system.open_to_write(path, os.O_CREAT)
    monkeypatch.setattr(system.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 999}))
    with pytest.raises(OSError, match="No space left") as error:
        system.reserve(descriptor, path, 1000)
    os.close(descriptor)
    assert error.value.errno == errno.ENOSPC
    assert path.stat().st_size == 0


def test_a_lock_is_held_until_its_descriptor_is_closed(tmp_path: Path) -> None:
    first = system.lock(tmp_path)
    assert first is not None
    with pytest.raises(BlockingIOError):
        system.lock(tmp_path)
    os.close(first)
    second = system.lock(tmp_path)
    assert second is not None
    os.close(second)


ELSEWHERE = """
import os, sys
# these know their system, and ask for its calls when they are imported
import subprocess, tempfile, shutil, multiprocessing, torch, transformers, peft, safetensors.torch
for name in {names}:
    if hasattr(os, name):
        delattr(os, name)
sys.modules["fcntl"] = None
from pissa_kernels.cli.main import main
model, out = sys.argv[1:]
statuses = [
    main(["init", model, out, "--rank", "4", "--json"]),
    main(["verify", model, out]),
    main(["convert", out + "/pissa_init", out, out + "-lora"]),
    main(["report", out]),
    main(["init", model, out, "--rank", "2", "--force"]),
    main(["verify", model, out, "--json"]),
]
print(statuses)
"""


@pytest.mark.slow
def test_every_command_works_elsewhere(model: Path, tmp_path: Path) -> None:
    code = ELSEWHERE.format(names=LINUX_ONLY)
    arguments = [sys.executable, "-c", code, str(model), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([0] * 6), done.stdout + done.stderr
