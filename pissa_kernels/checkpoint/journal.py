"""The folder in which a result grows: hidden beside it, with a journal of what is done, renamed at the end.

A journal line is written after its tensor, and says what the tensor's bytes hash to. Nothing rests on the order in
which the system brings them to the disk: a run that goes on reads every tensor that the journal claims, and does those
again whose bytes are not there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..files.atomic import RESUMABLE, fsync, write_text
from ..files.header import write_at
from .plan import CheckpointJob, unfinished_folder

PLAN = "plan.json"


class Journal:
    """The folder beside ``out``.

    Attributes:
        folder: of the run: plan, journals, and ``out``.
        out: what becomes the result.
    """

    def __init__(self, out: Path) -> None:
        self.result = out
        self.folder = unfinished_folder(out)
        self.out = self.folder / "out"
        self._replaced = self.folder / "replaced"

    def exists(self) -> bool:
        """Whether a run has begun, and not ended."""
        return (self.folder / PLAN).is_file()

    def begin(self, plan: CheckpointJob, *, replace: bool) -> None:
        """Make every file that tensors are written into, at its full size, and then the plan.

        Args:
            plan: of the run.
            replace: at the end, take the place of a result that is there.

        Raises:
            OSError: no space for all of it, or no permission. Nothing is left then.
        """
        try:
            if self._replaced.exists() and not os.path.lexists(self.result):
                os.replace(self._replaced, self.result)  # a run was killed before its own took this one's place
            self._empty()
            self.lay_out(plan)
            text = json.dumps({"replace": replace, "plan": plan.record()}, sort_keys=True) + "\n"
            write_text(self.folder / PLAN, text, suffix=RESUMABLE)
        except OSError as error:
            self._empty()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    error.errno, f"no space for the {plan.size / 1e9:.3g} GB of {self.result} ({error.strerror})"
                ) from None
            raise

    def lay_out(self, plan: CheckpointJob) -> None:
        """Make every file that tensors are written into, at its full size and with its header; what it holds stays."""
        for name, header in plan.headers.items():
            path = self.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                # so that a full disk is met here, and not after hours
                os.posix_fallocate(descriptor, 0, header.size)
                write_at(descriptor, memoryview(header.encoded), 0)
            finally:
                os.close(descriptor)

    def replaces(self) -> bool:
        """Whether the run that has begun here may take the place of a result that is there."""
        return bool(self._begun()["replace"])

    def check(self, plan: CheckpointJob) -> None:
        """See that the run that has begun here is the one that is planned.

        Raises:
            ValueError: it is another one, or the source has changed since.
        """
        began, now = self._begun()["plan"], plan.record()
        for key, value in now.items():
            if began.get(key) != value:
                if key == "fingerprint":
                    names = value.keys() | began[key].keys()
                    changed = sorted(name for name in names if value.get(name) != began[key].get(name))
                    raise ValueError(
                        f"{plan.checkpoint.folder} has changed since the run began that {self.folder} is of "
                        f"({', '.join(changed[:3])}); --force begins again"
                    )
                raise ValueError(
                    f"the run that {self.folder} is of had another {key}: {_short(began.get(key))}, now "
                    f"{_short(value)}; --force begins again"
                )

    def _begun(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
        return record

    def _empty(self, but: str = "") -> None:
        if not but:
            (self.folder / PLAN).unlink(missing_ok=True)  # first: without it there is no run to go on with
        for path in self.folder.iterdir():
            if path.name != but:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def discard(self) -> None:
        """Take the folder away, its plan last: as long as something else is in it, there is a run to go on with."""
        self._empty(but=PLAN)
        self._empty()
        self.folder.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out, for as long as this process lives.

        Raises:
            RuntimeError: another run is at work here.
        """
        import fcntl  # not on Windows, where the rest of the package can be imported

        missing = [parent for parent in self.folder.parents if not parent.exists()]
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise RuntimeError(f"another process is writing {self.result}") from None
            except OSError:  # a file system without locks
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.folder), os.fstat(descriptor)):
                    break
            os.close(descriptor)  # the run that held it has ended meanwhile, and its folder with it
        try:
            yield
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):  # these are empty only where nothing was begun
                for folder in (self.folder, *missing):
                    folder.rmdir()

    def open(self, rank: int) -> IO[str]:
        """One rank's journal, to be appended to; a line that was cut short is ended first."""
        path = self.folder / f"journal-{rank}.jsonl"
        file = path.open("a", encoding="utf-8")
        if path.stat().st_size:
            file.write("\n")
        return file

    def records(self) -> Iterator[dict[str, Any]]:
        """Every line that was written whole."""
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        yield record

    def publish(self) -> None:
        """Bring everything to the disk, and the folder to its place; a result that is there is replaced."""
        for path, _, files in os.walk(self.out, topdown=False):
            for name in files:
                fsync(Path(path, name))
            fsync(Path(path))
        if os.path.lexists(self.result):
            os.replace(self.result, self._replaced)
        os.replace(self.out, self.result)
        fsync(self.result.parent)
        self.discard()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:99] + "…"
