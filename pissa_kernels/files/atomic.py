"""Atomic writes: a file or a folder appears complete, or does not appear."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .destination import destination
from .system import flush

# Temporary name of a file inside a folder that a killed run leaves behind: the run that resumes overwrites it. A random
# name would stay there and be published with the result.
RESUMABLE = ".new"


@contextlib.contextmanager
def atomic_folder(out: Path, *, replace: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A temporary folder beside ``out`` that is renamed to ``out`` at the end, or deleted after an exception.

    Args:
        out: a folder that does not exist or is empty; a symbolic link is followed.
        replace: called with an ``out`` that holds something, before that is deleted. It raises where nothing may be
            deleted. None refuses such a folder.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: of
            :func:`pissa_kernels.files.destination.destination`, before anything is written.
    """
    out = destination(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if replace is not None and out.exists():
            replace(out)
            _exchange(temporary, out)
            return
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name(error, out)
        raise


def _exchange(temporary: Path, out: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    os.replace(out, old)  # rename(2) may replace an empty folder
    try:
        os.replace(temporary, out)
    except BaseException:
        os.replace(old, out)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def atomic_file(path: Path, *, suffix: str | None = None, mode: int = 0o644) -> Iterator[Path]:
    """A temporary file beside ``path``, to be written by its name, that replaces ``path`` at the end.

    Concurrent readers see the old file or the new one. The contents are fsynced before the rename.

    Args:
        path: the file; its folder exists.
        suffix: name the temporary file ``.<name><suffix>``. By default the name is random, so that concurrent writers
            do not share it.
        mode: permissions of the file.
    """
    if suffix is None:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
    else:
        temporary = temporary_path(path, suffix)
    try:
        yield temporary
        flush(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise


def _name(error: BaseException, path: Path) -> None:
    """Name what is written in an error of the system that names no file, such as one of a full disk."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = os.fspath(path)


def temporary_path(path: Path, suffix: str) -> Path:
    """Where :func:`atomic_file` writes a file with a suffix."""
    return path.with_name(f".{path.name}{suffix}")


def write_text(path: Path, text: str, *, suffix: str | None = None) -> None:
    """Write a UTF-8 text file atomically; the arguments are those of :func:`atomic_file`.

    Raises:
        OSError: the file cannot be written. An existing file is unchanged then.
    """
    with atomic_file(path, suffix=suffix) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def copy_file(source: Path, path: Path) -> str:
    """Copy a file atomically with its permissions, made writable for the owner. Returns its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, suffix=RESUMABLE, mode=source.stat().st_mode & 0o777 | 0o200) as temporary:
        shutil.copyfile(source, temporary)
    return sha256_of_file(path)


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def check_writable_target(path: Path, kind: str, recognizes: Callable[[Path], bool]) -> Path:
    """Refuse a path that cannot become a file, and a file of another kind, before any work is done for it.

    Args:
        path: the file.
        kind: what is written, for the message.
        recognizes: whether a file may be replaced. An empty file always may.

    Returns:
        The path with links followed, because a rename replaces a link itself.

    Raises:
        FileExistsError: ``path`` is a folder, a link that leads nowhere, or a file that must not be replaced.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path.name}: the folder {path.parent} does not exist")
    if not os.path.lexists(path):
        return path
    if not path.is_file():
        what = f"a link to {os.readlink(path)}, which is no file" if path.is_symlink() else "not a regular file"
        raise FileExistsError(f"{path} is {what}; give another name")
    if path.stat().st_size and not recognizes(path):
        raise FileExistsError(f"{path} exists and is not {kind}, so it is not replaced; give another name")
    return path.resolve()
