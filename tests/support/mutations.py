"""Files of a checkpoint or an adapter, damaged at random in the ways in which files are damaged or forged."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 3.5, -0.5, 2**31, 2**63, 10**30, -(10**30), 1e308, float("nan"), float("inf")),
    *("", "x", "é\ud800", "\n\x1b[31m", "../..", "/", "a" * 5000, "(", "F32", "BF16", "F99", "pissa", "LORA", "0"),
    *([], {}, [[]], [None], {"": None}, [0, 0], [-1, 2**70], {"a": {"b": [1]}}),
]
BYTES = [
    *(b"", b"\0", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"PK\x03\x04", b"<!DOCTYPE html><html>"),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n",
    b"\xff" * 8,
    (2**62).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"{}",
    b"[" * 100_000,
]


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one file or more of a folder. Returns what was done, for the message of a failure."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            break
        path = rng.choice(files)
        done.append(f"{path.relative_to(folder)}: {_damage(path, rng)}")
    return "; ".join(done)


def _damage(path: Path, rng: random.Random) -> str:
    kinds: list[Callable[[Path, random.Random], str]] = [_bytes, _place]
    if path.suffix == ".json":
        kinds += [_json] * 8
    if path.suffix == ".safetensors":
        kinds += [_header] * 8
    return rng.choice(kinds)(path, rng)


def _json(path: Path, rng: random.Random) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(path.read_text(encoding="utf-8"))
        what = _change(record, rng)
        path.write_text(json.dumps(record), encoding="utf-8")
        return what
    return _bytes(path, rng)


def _header(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        record = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return _bytes(path, rng)
    what = _change(record, rng)
    text = json.dumps(record).encode()
    path.write_bytes((len(text) + rng.choice([0, 0, 0, 1, -1])).to_bytes(8, "little") + text + data[8 + length :])
    return f"header {what}"


def _change(record: Any, rng: random.Random) -> str:
    """Change a random value inside a JSON value."""
    at, where = record, ""
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        if not keys:
            return f"{where} kept"
        key = rng.choice(keys)
        inner = at[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.75:
            at, where = inner, f"{where}.{key}"
            continue
        break
    kind = rng.randrange(6)
    if kind == 0:
        del at[key]
        return f"{where}.{key} deleted"
    if kind == 1 and isinstance(at, dict):
        new = rng.choice(["", "x", "\ud800", "a" * 300, "__metadata__", f"{key}.weight", "(", str(key).upper()])
        at[new] = at.pop(key)
        return f"{where}.{key} renamed {new[:20]!r}"
    if kind == 2 and isinstance(inner, int):
        at[key] = inner + rng.choice([1, -1, 8, -8, inner, 1000])
    elif kind == 3 and isinstance(at, list):
        at.insert(0, copy.deepcopy(inner))
    else:
        at[key] = rng.choice(VALUES)
    return f"{where}.{key} = {str(at[key])[:40]!r}"


def _bytes(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    kind = rng.randrange(5)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        data = bytearray(rng.choice(BYTES))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
    elif kind == 3 and data:
        at = min(at, len(data) - 1)
        data[at] ^= 1 << rng.randrange(8)
    else:
        del data[at : at + rng.choice([1, 8, 100])]
    path.write_bytes(data)
    return f"bytes {kind} at {at}"


def _place(path: Path, rng: random.Random) -> str:
    """Something else than a file where a file was."""
    kind = rng.choice(
        ["nothing", "folder", "dangling link", "link to itself", "fifo", "link to its folder", "link out"]
    )
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to its folder":
        path.symlink_to(".")
    elif kind == "link out":
        path.symlink_to("/etc/passwd")
    return kind


def copy_tree(source: Path, target: Path) -> Path:
    """A copy with links as links."""
    return Path(shutil.copytree(source, target, symlinks=True))
