"""What files are that do not hold what their names say: Git LFS pointers, error pages, downloads cut short."""

from __future__ import annotations

import json
from pathlib import Path

from .walk import obstacle

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
# A pointer is shorter.
LFS_BYTES = 1024
AGAIN = "download it again"
# How a file begins, and what it is then.
_BEGINNINGS = (
    (b"PK\x03\x04", "a file of torch.save; load it with torch.load and save it as safetensors"),
    (b"\x80\x02", "a pickle; load it with torch.load and save it as safetensors"),
    (b"\x80\x04", "a pickle; load it with torch.load and save it as safetensors"),
    (b"GGUF", "a GGUF file; give the model's safetensors"),
    (b"\x89HDF", "an HDF5 file; give the model's safetensors"),
)


def check_readable(path: Path) -> None:
    """Refuse what is not a file that can be read.

    Raises:
        OSError: with what it is.
    """
    if found := obstacle(path):
        raise OSError(f"{path} is {found}; accepted is a file that can be read")


def check_text(path: Path) -> None:
    """Refuse a file that stands in place of a text file that could not be downloaded.

    Raises:
        OSError: it cannot be read.
        ValueError: with what it is.
    """
    check_readable(path)
    if found := _no_download(_beginning(path)):
        raise ValueError(f"{path} is {found}")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS puts in place of a large file."""
    return path.stat().st_size <= LFS_BYTES and _beginning(path).startswith(LFS_POINTER)


def not_safetensors(path: Path) -> str | None:
    """What a file is that the safetensors package refuses, and what to do; None where nothing is recognized."""
    data = _beginning(path)
    if found := _no_download(data):
        return found
    for beginning, what in _BEGINNINGS:
        if data.startswith(beginning):
            return what
    if not any(data):
        return f"zeros at its start, as in a download that did not complete; {AGAIN}"
    if data.isascii() and not any(byte < 9 for byte in data):
        return f"text ({data.decode().split(chr(10))[0][:60]!r}) and not safetensors; {AGAIN}"
    return _cut_short(path)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LFS_BYTES)


def _no_download(data: bytes) -> str | None:
    if not data:
        return f"empty; {AGAIN}"
    if data.startswith(LFS_POINTER):
        return "a Git LFS pointer and not the file itself; run git lfs pull in its folder"
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"an HTML page, such as a server sends with an error, and not the file itself; {AGAIN}"
    return None


def _cut_short(path: Path) -> str | None:
    """Sizes of a file that ends before its tensors do."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return None
        try:
            record = json.loads(file.read(length))
            stop = 8 + length + max(value["data_offsets"][1] for key, value in record.items() if key != "__metadata__")
            return (
                f"damaged or truncated: its tensors end at byte {stop} and it has {size}; {AGAIN}"
                if stop > size
                else None
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return None
