"""The unfinished result: a hidden folder beside OUT, with a journal of its tensors, which is renamed to OUT at the end.

The plan is written first and deleted last: a folder that holds something and no plan is not that of a run.

A journal line is written after its tensor and holds the hashes of the tensor's bytes. Lines and bytes may reach the
disk in any order: ``--resume`` re-hashes every tensor in the journal, and writes those again whose bytes are missing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..files import system
from ..files.atomic import RESUMABLE, copy_file, temporary_path, write_text
from ..files.destination import first_unlisted
from ..files.header import sha256, write_at
from ..report.strict import load
from .fence import RUN, Fence, first_process, run_record
from .manifest import MANIFEST, REPORT, REPORT_DIGEST
from .placement import Placement, appeared, is_result_of
from .plan import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CheckpointJob
from .same_plan import check_same_plan
from .stacks import STAGED

PLAN = "plan.json"


class Journal:
    """The folder of an unfinished run.

    Args:
        out: folder of the result.

    Attributes:
        placement: where the result is moved to.
        result: folder of the result.
        folder: the hidden folder beside it, with the plan, the journals and ``out``.
        out: what is moved to ``result`` at the end.
        fence: asked before each write.
        several_hosts: whether runs on more than one machine have written to the folder.
    """

    def __init__(self, out: Path) -> None:
        self.placement = Placement(out)
        self.result, self.folder, self.out = out, self.placement.folder, self.placement.unplaced
        self.fence, self.several_hosts, self._name = Fence(self.folder), False, "journal"

    def exists(self) -> bool:
        """Whether there is an unfinished run."""
        return (self.folder / PLAN).is_file()

    def check_folder(self) -> None:
        """Refuse a folder that holds what no run has made, before it is changed.

        Files with several names get bytes of their own, so that a copy made of hard links keeps what it has.

        Raises:
            FileExistsError: the message names what it holds.
        """
        if found := first_unlisted(self.folder, self._known_files(), besides=[self.placement.replaced.name]):
            raise FileExistsError(
                f"{self.folder} holds {found}, which init has not made; move it away, or choose another OUT"
            )
        for path in self.folder.rglob("*"):
            if self.placement.replaced in path.parents:
                continue
            if path.is_symlink():
                raise FileExistsError(f"{path} is a symbolic link, which init has not made; move it away")
            if path.is_file() and path.stat().st_nlink > 1:
                copy_file(path, path)
        self.placement.check_replaced()

    def _known_files(self) -> set[str]:
        """What a run writes into the folder, by its plan."""
        known = {PLAN, STAGED, RUN}
        if self.exists():
            source = self._plan()["plan"]["fingerprint"]
            written = {*source, MANIFEST, REPORT, REPORT_DIGEST, ADAPTER_CONFIG, ADAPTER_WEIGHTS}
            known |= {path.name for path in self.folder.glob("journal-*.jsonl")}
            known |= {
                f"{folder}/{name}" for folder in (self.out.name, self.placement.complete.name) for name in written
            }
        return known | {str(temporary_path(Path(name), RESUMABLE)) for name in known}

    def begin(self, job: CheckpointJob, *, replace: bool) -> None:
        """Write the plan, and create every file that tensors are written into, at its full size.

        Args:
            job: the run.
            replace: whether the run may replace what is at ``result`` when it ends.

        Raises:
            OSError: no space for the whole result, or no permission. Nothing is left behind.
        """
        others = sum(
            len(job.texts[name].encode()) if name in job.texts else (job.checkpoint.folder / name).stat().st_size
            for name in job.checkpoint.others
        )
        try:
            self._empty()
            text = json.dumps({"replace": replace, "plan": job.record()}, sort_keys=True) + "\n"
            write_text(self.folder / PLAN, text, suffix=RESUMABLE)
            self.lay_out(job)
            if others > shutil.disk_usage(self.folder).free:  # they are copied at the end, after all the work
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.discard()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    error.errno,
                    f"no space for the {(job.size + others) / 1e9:.3g} GB of {self.result} ({error.strerror})",
                ) from None
            raise

    def lay_out(self, job: CheckpointJob) -> None:
        """Create every file that tensors are written into, at its full size and with its header. Contents are kept."""
        files = {self.out / name: header for name, header in job.headers.items()}
        if job.staged is not None:
            files[self.folder / STAGED] = job.staged
        for path, header in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = system.open_to_write(path, os.O_CREAT)
            try:
                # a full disk fails here, and not after hours of work
                system.reserve(descriptor, path, header.size)
                write_at(descriptor, memoryview(header.encoded), 0)
            finally:
                os.close(descriptor)

    def begin_run(self, hosts: list[str]) -> str | None:
        """Keep all earlier runs from writing, where some of them or this one has several processes.

        Args:
            hosts: the machines of this run; empty for a run of one process.

        Returns:
            What the other processes need for :meth:`join_run`; None for nothing.
        """
        if not hosts and not (self.folder / RUN).exists():
            return None
        text, self.several_hosts = run_record(self.folder, hosts or [socket.gethostname()])
        return text

    def join_run(self, text: str | None, check: Callable[[], None]) -> None:
        """Write as a process of a run from here on.

        Args:
            text: what :meth:`begin_run` has returned in process 0.
            check: raises ProcessLost if this process has lost contact with the others.
        """
        self.fence = Fence(self.folder, text, check)
        if text is not None:  # a line that an earlier run still writes is not in the middle of one of this run
            self._name = f"journal-{sha256(text.encode())[:8]}"

    def replaces(self) -> bool:
        """Whether the unfinished run may replace what is at ``result``."""
        return bool(self._plan()["replace"])

    def check(self, job: CheckpointJob) -> None:
        """Check that a job is that of the unfinished run.

        Raises:
            ValueError: the unfinished run had another plan, or the source has changed since it was started.
        """
        check_same_plan(self._plan()["plan"], job.record(), self.folder, job.checkpoint.folder)

    def _plan(self) -> dict[str, Any]:
        """The plan of the unfinished run.

        Raises:
            FileExistsError: it is damaged, so that nobody knows what is in the folder.
        """
        try:
            record = load((self.folder / PLAN).read_text(encoding="utf-8"))
            plan = record.get("plan") if isinstance(record, dict) else None
            if not (isinstance(plan, dict) and isinstance(plan.get("fingerprint"), dict)):
                raise ValueError("it is not a plan")
            return {"replace": False, **record}  # type: ignore[dict-item]
        except ValueError as error:
            raise FileExistsError(
                f"{self.folder} is not of a run of init, as its {PLAN} is damaged ({error}); move it away, or choose "
                "another OUT"
            ) from None

    def _empty(self) -> None:
        """Delete the contents of the folder but for the plan."""
        self.placement.delete_replaced()
        for path in self.folder.iterdir():
            if path.name != PLAN:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def discard(self) -> None:
        """Delete the folder, its plan last: until all else is deleted, there is a run that can be resumed."""
        self._empty()
        (self.folder / PLAN).unlink(missing_ok=True)
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
                who = first_process(self.folder)
                about = f" ({who}); end that process if it hangs" if who else ""
                raise RuntimeError(f"another process is writing {self.result}{about}") from None
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
            for folder in (self.folder, *missing):
                with contextlib.suppress(OSError):  # folders that hold something are kept
                    folder.rmdir()

    def open(self, process: int) -> IO[str]:
        """Open the journal of one process for appending, on a new line if the last one was cut short."""
        path = self.folder / f"{self._name}-{process}.jsonl"
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
        """fsync everything, move ``out`` to ``result``, and delete the folder.

        Args:
            replace: replace the result of ``init`` at ``result``, even if the run was not started to do so.

        Raises:
            FileExistsError: ``result`` is not an empty folder, and is not to be replaced.
        """
        for path, _, files in os.walk(self.out, topdown=False):
            for name in files:
                system.flush(Path(path, name))
            system.flush(Path(path))
        if self.placement.occupied():
            if not (replace or self.replaces()):
                raise appeared(self.result)
            self.placement.check(replace=True)  # hours after the first check
            self.fence()
            self.placement.set_aside()
        self.fence()
        os.replace(self.out, self.placement.complete)
        self.placement.place()
        self.discard()

    def finish(self, job: CheckpointJob) -> bool:
        """Finish the publication that a killed run has begun. False if there is work to do before."""
        if self.placement.complete.exists():
            self.placement.place()
        elif self.out.exists() or not is_result_of(self.result, job.record()):
            return False
        self.discard()
        return True
