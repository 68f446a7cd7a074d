"""Weights that are decomposed before there is a plan: the bytes that the plan comes to without them, or not used."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa_kernels.checkpoint import ahead as ahead_module
from pissa_kernels.checkpoint import commands
from pissa_kernels.checkpoint import targets as targets_module
from pissa_kernels.checkpoint.ahead import Ahead
from pissa_kernels.checkpoint.init import begins, init_checkpoint
from pissa_kernels.checkpoint.plan import make_plan
from pissa_kernels.checkpoint.planner import Planner
from pissa_kernels.checkpoint.targets import Adapter, AdapterOptions
from pissa_kernels.files.folder import open_checkpoint
from pissa_kernels.files.header import read_tensor
from pissa_kernels.pissa import principal_factors

from .checkpoints import layers, save, small, untimed
from .models import build
from .refusing import LAYER, edit_tensor, init, refused

OPTIONS = AdapterOptions(rank=4)
PATIENCE = 60.0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Ahead]]:
    """What commands decompose ahead: all that they guess, as their plans are long in coming."""
    made: list[Ahead] = []

    class Seen(Ahead):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    class Slow(Planner):
        def adapter(self) -> Adapter:
            for ahead in made:
                assert not wait([job for _, job in ahead._jobs.values()], PATIENCE).not_done
            return super().adapter()

    monkeypatch.setattr(commands, "may_fork", lambda: True)  # whatever threads the tests run beside
    monkeypatch.setattr(commands, "Ahead", Seen)
    monkeypatch.setattr(commands, "Planner", Slow)
    threads = torch.get_num_threads()
    yield made
    assert torch.get_num_threads() == threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pissa_kernels")]


@pytest.mark.parametrize(
    ("name", "arguments", "options", "taken"),
    [
        ("llama", [], {}, 7),
        ("llama", ["--alpha", 8, "--rslora"], {"alpha": 8.0, "use_rslora": True}, 7),
        ("llama", ["--init", "pissa_niter_2", "--seed", 3], {"init": "pissa_niter_2", "seed": 3}, 7),
        ("llama", ["--target-modules", "q_proj", "mlp.up_proj"], {"target_modules": ("q_proj", "mlp.up_proj")}, 2),
        ("llama", ["--target-modules", r".*\.\w_proj"], {"target_modules": (r".*\.\w_proj",)}, 4),
        ("llama", ["--exclude-modules", LAYER], {"exclude_modules": (LAYER,)}, 6),
        ("llama", ["--rank-pattern", "q_proj=2"], {"rank_pattern": {"q_proj": 2}}, 6),
        ("llama", ["--alpha-pattern", "mlp.*=2"], {"alpha_pattern": {"mlp.*": 2.0}}, 4),
        ("bert", [], {}, 12),
        ("gpt2", [], {}, 0),
    ],
)
def test_the_bytes_are_the_plans(
    name: str, arguments: list[object], options: dict[str, Any], taken: int, tmp_path: Path, seen: list[Ahead]
) -> None:
    model, out = tmp_path / "model", tmp_path / "results" / "out"
    small(model) if name == "llama" else save(build(name, torch.float16), model)
    init_checkpoint(make_plan(model, out, AdapterOptions(rank=4, **options)), shown=False)
    expected = untimed(out.parent)
    shutil.rmtree(out)
    assert init(model, out, "--workers", 2, *arguments) == 0
    assert untimed(out.parent) == expected
    assert [ahead.taken for ahead in seen] == [taken]


def test_each_is_what_the_worker_computes(model: Path, tmp_path: Path) -> None:
    plan = make_plan(model, tmp_path / "out", OPTIONS)
    with Ahead(plan.checkpoint, OPTIONS, 3) as ahead:
        ahead.pool.shutdown()
        assert ahead.serves(plan)
        for target in plan.adapter.targets:
            done = ahead.take(target)
            assert done is not None
            with (model / target.shard).open("rb") as file:
                weight = read_tensor(file.fileno(), target.entry)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            mine = principal_factors(weight, 4, scaling=1.0, init="pissa", fan_in_fan_out=False, seed=0)
            torch.set_num_threads(threads)
            theirs = vars(done.widened())
            for part, value in vars(mine).items():
                assert torch.equal(theirs[part], value) if isinstance(value, torch.Tensor) else theirs[part] == value
            assert ahead.take(target) is None, "it is given away once"


@pytest.mark.parametrize("other", [{"seed": 1}, {"rank": 3}, {"init": "pissa_niter_1"}, {"alpha": 1.0}])
def test_another_plan_is_not_served(other: dict[str, Any], model: Path, tmp_path: Path) -> None:
    plan = make_plan(model, tmp_path / "out", AdapterOptions(**{"rank": 4, **other}))
    with Ahead(plan.checkpoint, OPTIONS, 2) as ahead:
        assert not ahead.serves(plan)
        init_checkpoint(plan, workers=2, shown=False, ahead=ahead)
        assert ahead.taken == 0


def test_a_source_that_changes_while_it_is_planned(model: Path, tmp_path: Path) -> None:
    """What was read of it before is not mixed with what it is now."""
    checkpoint = open_checkpoint(model)
    with Ahead(checkpoint, OPTIONS, 2) as ahead:
        ahead.pool.shutdown()
        edit_tensor(model, f"{LAYER}.weight", lambda tensor: 2 * tensor)
        init_checkpoint(make_plan(model, tmp_path / "out", OPTIONS), shown=False, ahead=ahead)
        assert ahead.taken == 0


def test_the_reported_peak_is_from_its_beginning_on(model: Path, tmp_path: Path) -> None:
    with Ahead(open_checkpoint(model), OPTIONS, 2) as ahead:
        passing = torch.ones(64 << 20, dtype=torch.uint8)
        time.sleep(0.1)
        del passing
        plan = make_plan(model, tmp_path / "out", OPTIONS)
        outcome = init_checkpoint(plan, workers=2, shown=False, ahead=ahead)
    peak = outcome.report.peak_extra_bytes
    assert peak is None or peak >= 60 << 20


def test_a_weight_that_is_refused_is_left_to_the_plan(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seen: list[Ahead]
) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = float("nan")
        return tensor

    edit_tensor(model, f"{LAYER}.weight", spoil)
    words = rf"error: the weight of layer '{LAYER}' \(32, 32\): .*NaN"
    refused(capsys, words, model, tmp_path / "out", "--workers", 2, left=(".out.unfinished",))
    assert len(seen) == 1


def test_one_under_way_is_waited_for_and_no_other_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(PATIENCE)
        return principal_factors(*arguments, **options)

    monkeypatch.setattr(targets_module, "principal_factors", slow)
    plan = make_plan(model, tmp_path / "out", OPTIONS)
    first, *rest = (item.target for item in plan.items if item.target is not None)
    with Ahead(plan.checkpoint, OPTIONS, 2) as ahead:
        assert begun.wait(PATIENCE)
        ahead.stop()
        threading.Timer(0.2, go_on.set).start()
        assert ahead.take(first) is not None, "the order is the plan's"
        assert [ahead.take(target) for target in rest] == [None] * len(rest)


def test_what_is_kept_is_bounded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(model, tmp_path / "out", OPTIONS)
    largest = next(item.target for item in plan.items if item.target is not None)
    monkeypatch.setattr(ahead_module, "KEPT_BYTES", 2 * (2 * 4 * sum(largest.shape) + 4 * 4 + 3 * 64))
    with Ahead(plan.checkpoint, OPTIONS, 2) as ahead:
        ahead.pool.shutdown()
        found = [ahead.take(item.target) is not None for item in plan.items if item.target is not None]
    assert found == [True, True, *[False] * 5]


def test_seconds_are_counted_from_the_beginning(
    model: Path, tmp_path: Path, seen: list[Ahead], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return principal_factors(*arguments, **options)

    monkeypatch.setattr(targets_module, "principal_factors", slow)
    assert init(model, tmp_path / "out", "--workers", 2) == 0
    assert seen[0].taken == 7, "none was slow in the run itself"
    assert all(layer["seconds"] >= 0.1 for layer in layers(tmp_path / "out"))
    total = float(capsys.readouterr().out.partition(" s in layers, ")[2].split()[0])
    assert total >= 0.7


@pytest.mark.parametrize(
    "arguments", [["--dry-run", "--workers", 2], ["--workers", 1], ["--workers", 2, "--resume"]], ids=str
)
def test_nothing_is_begun_for_nothing(
    arguments: list[object], model: Path, tmp_path: Path, seen: list[Ahead], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--resume" in arguments:
        assert init(model, tmp_path / "out", "--workers", 1) == 0
    started: list[str] = []
    plain = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        started.append(thread.name)
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert init(model, tmp_path / "out", *arguments) == 0
    assert seen == []
    assert started == [] or "--dry-run" not in arguments


def test_when_a_run_begins(tmp_path: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / ".out.unfinished" / "plan.json"
    choices = [(resume, force) for resume in (False, True) for force in (False, True)]
    assert [begins(out, *choice) for choice in choices] == [True, True, True, True]
    out.mkdir()
    assert [begins(out, *choice) for choice in choices] == [False, True, False, True]
    plan.parent.mkdir()
    plan.touch()
    assert [begins(out, *choice) for choice in choices] == [False, True, False, False]
    out.rmdir()
    assert [begins(out, *choice) for choice in choices] == [False, True, False, False]
