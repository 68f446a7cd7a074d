"""A process whose run was given up does not write, and a run of one process has nothing of this."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa_kernels.checkpoint.fence import RUN, Fence, first_process, run_record
from pissa_kernels.checkpoint.journal import Journal
from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.run import init_checkpoint
from pissa_kernels.checkpoint.verify import verify_checkpoint
from pissa_kernels.checkpoint.worker import Worker
from pissa_kernels.runtime.contact import ProcessLost

from ...support.checkpoints import contents
from ...support.crashing import OPTIONS


def cut_off() -> None:
    raise ProcessLost("cut off")


@pytest.mark.parametrize("what", ["another run", "no folder", "no contact"])
def test_nothing_is_written_after_another_run_has_begun(what: str, pristine: Path, tmp_path: Path) -> None:
    job, journal = plan_checkpoint(pristine, tmp_path / "out", OPTIONS), Journal(tmp_path / "out")
    journal.folder.mkdir()
    journal.begin(job, replace=False)
    text, _ = run_record(journal.folder, ["a", "b"])
    fence = Fence(journal.folder, text)
    layer = next(tensor for tensor in job.tensors if tensor.target is not None)
    with Worker(job, journal.out, torch.device("cpu"), fence) as worker:
        worker.run(job.tensors[-1])
        if what == "another run":
            run_record(journal.folder, ["b"])
        elif what == "no folder":
            (journal.folder / RUN).unlink()
        else:
            fence.in_contact = cut_off
        before = contents(journal.out)
        for tensor in layer, job.tensors[-2]:
            with pytest.raises(ProcessLost, match=r"^cut off$" if what == "no contact" else r"^another run has taken"):
                worker.run(tensor)
        assert contents(journal.out) == before


def test_hosts_of_all_runs_are_known(tmp_path: Path) -> None:
    text, several = run_record(tmp_path, ["a", "a"])
    assert not several
    assert (tmp_path / RUN).read_text() == text
    again, several = run_record(tmp_path, ["b"])
    assert several
    assert json.loads(again)["hosts"] == ["a", "b"]
    assert json.loads(again)["run"] != json.loads(text)["run"]
    (tmp_path / RUN).write_text("\0\0\0")  # as after a power cut
    assert run_record(tmp_path, ["b"])[1]
    assert first_process(tmp_path).startswith("host ")


@pytest.mark.slow
def test_run_of_one_process_writes_no_number_and_loads_no_group(pristine: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pissa_kernels.checkpoint import fence, run\n"
        "fence.write_text = None\n"
        f"run.init_checkpoint({str(pristine)!r}, {str(tmp_path / 'out')!r}, rank=4, progress=False)\n"
        "print('pissa_kernels.runtime.meeting' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "False"


def test_run_of_one_process_takes_over(pristine: Path, tmp_path: Path) -> None:
    """It resumes a run of several, the other processes of which may still be there."""
    job, journal = plan_checkpoint(pristine, tmp_path / "out", OPTIONS), Journal(tmp_path / "out")
    journal.folder.mkdir()
    journal.begin(job, replace=False)
    text, _ = run_record(journal.folder, ["a"])
    found = []

    def stale(_: object) -> None:
        with pytest.raises(ProcessLost, match="another run has taken over"):
            Fence(journal.folder, text)()
        found.append(json.loads((journal.folder / RUN).read_text()))

    init_checkpoint(pristine, tmp_path / "out", rank=4, resume=True, progress=False, on_tensor=stale)
    assert len(found) == len(job.tensors)
    assert "a" in found[0]["hosts"]
    assert len(found[0]["hosts"]) == 2
    assert not journal.folder.exists()


@pytest.mark.parametrize("hosts", [["a", "b"], ["a"]])
def test_bytes_that_come_later_from_another_host_are_found(hosts: list[str], pristine: Path, tmp_path: Path) -> None:
    """A host that was cut off writes back its cache while one process resumes, after the tensor was written again."""
    out = tmp_path / "out"
    job, journal = plan_checkpoint(pristine, out, OPTIONS), Journal(out)
    journal.folder.mkdir()
    journal.begin(job, replace=False)
    run_record(journal.folder, hosts)
    written: list[str] = []

    def late(record: dict[str, Any]) -> None:
        written.append(record["tensor"])
        if len(written) == len(job.tensors):
            info = job.headers[record["shard"]].tensors[record["tensor"]]
            with (journal.out / record["shard"]).open("r+b") as file:
                file.seek(info.start)
                file.write(b"\x55" * info.nbytes)

    with pytest.raises(RuntimeError, match=r"are not those that were written; --resume writes the tensor again"):
        init_checkpoint(pristine, out, rank=4, resume=True, progress=False, on_tensor=late)
    assert len(written) == len(job.tensors)
    report = init_checkpoint(pristine, out, rank=4, resume=True, progress=False)
    assert (report.kept, report.written) == (len(job.tensors) - 1, 1)
    assert verify_checkpoint(pristine, out) == []
