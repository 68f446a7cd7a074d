"""The unfinished result: a hidden folder beside OUT, with a journal of its tensors, which is renamed to OUT at the end.

A journal line is written after its tensor and holds the hashes of the tensor's bytes. Lines and bytes may reach the
disk in any order: ``--resume`` re-hashes every tensor in the journal, and writes those again whose bytes are missing.
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

from ..files import system
from ..files.atomic import RESUMABLE, write_text
from ..files.header import write_at
from .plan import CheckpointJob, unfinished_folder

PLAN = "plan.json"


class Journal:
    """The folder of an unfinished run.

    Args:
        out: folder of the result.

    Attributes:
        result: folder of the result.
        folder: the hidden folder beside it, with the plan, the journals and ``out``.
        out: what is renamed to ``result`` at the end.
    """

    def __init__(self, out: Path) -> None:
        self.result = out
        self.folder = unfinished_folder(out)
        self.out = self.folder / "out"
        self._replaced = self.folder / "replaced"

    def exists(self) -> bool:
        """Whether there is an unfinished run."""
        return (self.folder / PLAN).is_file()

    def begin(self, job: CheckpointJob, *, replace: bool) -> None:
        """Create every file that tensors are written into, at its full size, and then write the plan.

        Args:
            job: the run.
            replace: whether the run may replace what is at ``result`` when it ends.

        Raises:
            OSError: no space for the whole result, or no permission. Nothing is left behind.
        """
        try:
            if os.path.lexists(self._replaced) and not os.path.lexists(self.result):
                os.replace(self._replaced, self.result)  # an earlier run was killed between two renames
            self._empty()
            self.lay_out(job)
            text = json.dumps({"replace": replace, "plan": job.record()}, sort_keys=True) + "\n"
            write_text(self.folder / PLAN, text, suffix=RESUMABLE)
        except OSError as error:
            self._empty()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    error.errno, f"no space for the {job.size / 1e9:.3g} GB of {self.result} ({error.strerror})"
                ) from None
            raise

    def lay_out(self, job: CheckpointJob) -> None:
        """Create every file that tensors are written into, at its full size and with its header. Contents are kept."""
        for name, header in job.headers.items():
            path = self.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = system.open_to_write(path, os.O_CREAT)
            try:
                # a full disk fails here, and not after hours of work
                system.reserve(descriptor, path, header.size)
                write_at(descriptor, memoryview(header.encoded), 0)
            finally:
                os.close(descriptor)

    def replaces(self) -> bool:
        """Whether the unfinished run may replace what is at ``result``."""
        return bool(self._plan()["replace"])

    def check(self, job: CheckpointJob) -> None:
        """Check that a job is that of the unfinished run.

        Raises:
            ValueError: the unfinished run had another plan, or the source has changed since it was started.
        """
        began, now = self._plan()["plan"], job.record()
        for key, value in now.items():
            if (before := began.get(key)) == value:
                continue
            if key == "fingerprint":
                changed = sorted(_differing(before, value))
                raise ValueError(
                    f"{job.checkpoint.folder} has changed since the run in {self.folder} was started "
                    f"({', '.join(changed[:3])}); --force starts again"
                )
            if isinstance(before, dict) and isinstance(value, dict):
                names = _differing(before, value)
                before, value = ({name: record.get(name) for name in sorted(names)} for record in (before, value))
            raise ValueError(
                f"the run in {self.folder} was started with {key} {_short(before)}, not {_short(value)}; "
                "--force starts again"
            )

    def _plan(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
        return record

    def _empty(self, keep: str = "") -> None:
        """Delete the contents of the folder but for the file ``keep``."""
        if not keep:
            (self.folder / PLAN).unlink(missing_ok=True)  # first: a folder without a plan cannot be resumed
        for path in self.folder.iterdir():
            if path.name != keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def discard(self) -> None:
        """Delete the folder, its plan last: until all else is deleted, there is a run that can be resumed."""
        self._empty(keep=PLAN)
        self._empty()
        self.folder.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock on the folder, which is created if it does not exist. The lock ends with the process.

        Raises:
            RuntimeError: another process holds the lock.
        """
        missing = [parent for parent in self.folder.parents if not parent.exists()]
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = system.lock(self.folder)
            except BlockingIOError:
                raise RuntimeError(f"another process is writing {self.result}") from None
            if descriptor is None:
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.folder), os.fstat(descriptor)):
                    break
            os.close(descriptor)  # the run that held the lock has just ended and deleted the folder
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)
            with contextlib.suppress(OSError):  # folders that hold something are kept
                for folder in (self.folder, *missing):
                    folder.rmdir()

    def open(self, process: int) -> IO[str]:
        """Open the journal of one process for appending, on a new line if the last one was cut short."""
        path = self.folder / f"journal-{process}.jsonl"
        file = path.open("a", encoding="utf-8")
        if path.stat().st_size:
            file.write("\n")
        return file

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all journals. Lines that were cut short are skipped."""
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        yield record

    def publish(self, *, replace: bool = False) -> None:
        """fsync everything, rename ``out`` to ``result``, and delete the folder.

        Args:
            replace: replace what is at ``result``, even if the run was not started to do so.

        Raises:
            FileExistsError: ``result`` is not an empty folder, and is not to be replaced.
        """
        for path, _, files in os.walk(self.out, topdown=False):
            for name in files:
                system.flush(Path(path, name))
            system.flush(Path(path))
        if os.path.lexists(self.result) and (replace or self.replaces()):
            os.replace(self.result, self._replaced)
        try:
            os.replace(self.out, self.result)  # rename(2) replaces an empty folder, and nothing else
        except OSError:
            if not os.path.lexists(self.result):
                raise
            raise FileExistsError(
                f"{self.result} has come to exist during the run; --resume --force replaces it"
            ) from None
        system.flush(self.result.parent)
        self.discard()


def _differing(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Keys whose values differ."""
    return {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:99] + "…"
