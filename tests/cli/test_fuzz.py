"""Damaged and forged inputs: one line for each, no traceback, no hang, nothing written but OUT, little memory."""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.cli.main import main

from ..convert.adapters import make
from ..support.mutations import copy_tree, mutate

# Set it to 10000 for a long run: 0.1 to 0.3 s for each.
COUNT = int(os.environ.get("PISSA_KERNELS_FUZZ", "150"))
FIRST = int(os.environ.get("PISSA_KERNELS_FUZZ_FIRST", "0"))
BATCHES = 15
# A run takes less than a second. Machines are shared.
SECONDS = 60
# Resident memory that all inputs of a batch may add.
MEMORY = 300 << 20
# The commands on a folder that holds base, out and quantized (made by init of base), trained, residual and report.json.
COMMANDS = {
    "base": [
        ["init", "base", "new"],
        ["init", "base", "new", "--dry-run", "--json"],
        ["init", "base", "new", "--quantize", "int8"],
        ["verify", "base", "out"],
        ["verify", "base", "quantized"],
    ],
    "out": [
        ["verify", "base", "out"],
        ["report", "out"],
        ["convert", "trained", "out", "new", "--base", "base"],
        ["init", "base", "out", "--force"],
        ["init", "out", "new"],
        ["convert", "out/pissa_init", "out", "new"],
        ["merge", "out", "out/pissa_init", "new"],
    ],
    "quantized": [["verify", "base", "quantized"], ["report", "quantized"], ["init", "quantized", "new"]],
    "trained": [["convert", "trained", "trained", "new"], ["convert", "trained", "residual", "new", "--rank", "3"]],
    "residual": [
        ["convert", "trained", "residual", "new", "--base", "base"],
        ["report", "residual", "--json"],
        ["merge", "residual", "residual/pissa_init", "new", "--dtype", "float32"],
    ],
    "report": [["report", "report/report.json", "--share", "0.5"], ["report", "report/report.json", "--html", "new"]],
    "unfinished": [["init", "base", "out", "--resume", "--force"], ["init", "base", "out", "--force"]],
}


class Hang(BaseException):
    """Not an Exception, which the command would report."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "folders"
    make(folder, width=32, layers=1)
    pk.init_checkpoint(folder / "base", folder / "out", rank=4, progress=False)
    pk.init_checkpoint(
        folder / "base", folder / "quantized", rank=4, target_modules=["q_proj", "lm_head"], progress=False,
        quantize="nf4", double_quant=True,
    )  # fmt: skip
    (folder / "report").mkdir()
    shutil.copy(folder / "out/pissa_init/pissa_report.json", folder / "report/report.json")
    return folder


def untouched(folder: Path) -> dict[str, Any]:
    """Kind, time, size and link of everything that is not OUT. Contents would take longer than the commands."""
    found = {}
    for path, names, files in os.walk(folder):
        for name in (*names, *files):
            full = Path(path, name)
            status = full.lstat()
            link = os.readlink(full) if full.is_symlink() else None
            found[str(full.relative_to(folder))] = (status.st_mode, status.st_ino, status.st_mtime_ns, link)
        names[:] = [name for name in names if not Path(path, name).is_symlink()]
    return {
        name: about for name, about in found.items() if Path(name).parts[0] not in ("new", "out", ".out.unfinished")
    }


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit status and standard error of a command."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), warnings.catch_warnings(), limited():
        warnings.simplefilter("ignore")
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = int(ended.code or 0)
    return status, errors.getvalue()


def check(folders: Path, place: Path, seed: int) -> None:
    """Damage a copy of the folders, and run a command on it."""
    rng = random.Random(seed)
    kind = rng.choice(list(COMMANDS))
    command = rng.choice(COMMANDS[kind])
    copy_tree(folders, place)
    if kind == "unfinished":
        with pytest.raises(KeyboardInterrupt):
            pk.init_checkpoint(place / "base", place / "out", rank=4, force=True, progress=False, on_tensor=interrupt)
    damaged = {"unfinished": ".out.unfinished"}.get(kind, kind)
    what = f"seed {seed}: {mutate(place / damaged, rng)}; {' '.join(command)}"
    before = untouched(place)
    # what could be a path is made one; the rest stays as it is
    known = {"base", "new", *COMMANDS, "report/report.json", "out/pissa_init", "residual/pissa_init"}
    arguments = [str(place / word) if word in known and index else word for index, word in enumerate(command)]
    try:
        status, errors = run(arguments)
    except BaseException as error:
        raise AssertionError(what) from error
    lines = errors.splitlines()
    problems = [line for line in lines if line.startswith("pissa-kernels: error: ")]
    assert status in (0, 1, 2), what
    assert "Traceback" not in errors, what + errors
    assert len(problems) == (status != 0) or (status == 1 and "--json" in command), what + errors
    assert len(lines) <= 3, what + errors
    assert not any("--traceback shows where" in line for line in problems), f"{what}: {errors}"
    assert all(any(name in line for name in (str(place), "layer ", "tensor ")) for line in problems), what + errors
    assert untouched(place) == before, what


def interrupt(record: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_inputs_are_one_line(batch: int, folders: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(FIRST + batch, FIRST + COUNT, BATCHES):
        place = tmp_path / "run"
        check(folders, place, seed)
        shutil.rmtree(place)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) << 10 < MEMORY
    assert torch.get_default_device() == torch.device("cpu")
