"""A folder that is there with all that belongs into it, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it at the end, or vanishes.

    Args:
        out: a folder that does not exist or is empty.
        replace: it may hold something, which is deleted once the new folder is in its place.
    """
    out = out.resolve()  # of a link, what it leads to
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if replace and out.exists():
            _exchange(staging, out)
            return
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _exchange(staging: Path, out: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    os.replace(out, old)  # a folder may take the place of an empty one
    try:
        os.replace(staging, out)
    except BaseException:
        os.replace(old, out)
        raise
    shutil.rmtree(old)
