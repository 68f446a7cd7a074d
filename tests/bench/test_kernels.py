"""The benchmark of the kernels, on sizes that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.harness.paths import RESULTS
from bench.harness.rows import read_rows
from bench.kernels import gate, memory, run
from bench.kernels.cases import CASES, VerbCase
from bench.kernels.table import table
from pissa_kernels import ops
from pissa_kernels.ops import reference

TINY = (
    VerbCase("transpose_cast", (40, 24), "bf16", "fp32"),
    VerbCase("subtract_lowrank_", (40, 24), "bf16", columns=3, fan_in_fan_out=True),
    VerbCase("matmul", (40, 24), "fp16", columns=4),
    VerbCase("rmatmul", (40, 24), "bf16", columns=4),
    VerbCase("normal", (40, 24), "fp32", columns=4),
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(run, "CASES", TINY)


def test_bytes_are_each_operand_once() -> None:
    expected = {
        "transpose_cast": 40 * 24 * (2 + 4),
        "subtract_lowrank_": 40 * 24 * 2 * 2 + 4 * 3 * (40 + 24),
        "matmul": 40 * 24 * 2 + 4 * 4 * (24 + 40),
        "rmatmul": 40 * 24 * 2 + 4 * 4 * (40 + 24),
        "normal": 40 * 24 * 4 + 4 * 4 * (24 + 40 + 24),
    }
    assert {case.verb: case.bytes for case in TINY} == expected


def test_every_backend_that_can_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["kernels", "--repeats", "1", "--out", str(out)]) == 0
    rows = read_rows(out)
    assert {row["case"] for row in rows} == {case.name for case in TINY}
    for row in rows:
        assert list(row) == list(read_rows(RESULTS / "kernels-cpu.jsonl")[0]), "committed rows have other keys"
        assert row["ok"], row
        assert row["min_ms"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["min_ms"] / 1e6)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
    for case in TINY:
        group = {row["provider"]: row for row in rows if row["case"] == case.name}
        able = [
            name for name, reasons in ops.unsupported_reasons(case.verb, case.inputs("cpu")[0]).items() if not reasons
        ]
        assert {name for name in group if name.startswith("ours")} == {f"ours {name}" for name in able}
        assert any(name.startswith("torch") for name in group)
        assert sum(row["chosen"] for row in group.values()) == 1
    text = table(rows)
    assert "ours torch *" in text or "ours csrc *" in text
    assert TINY[0].name in text


def test_an_element_that_nobody_writes_shows() -> None:
    case = TINY[0]
    weight, left, right = case.inputs("cpu")
    seen = []

    def all_but_the_last_row(W: torch.Tensor) -> torch.Tensor:
        out = torch.empty(W.mT.shape, dtype=torch.float32)
        seen.append(bool(out.isnan().all()))
        out[:-1].copy_(W.mT[:-1])
        return out

    before = torch.are_deterministic_algorithms_enabled()
    assert gate.errors(case, all_but_the_last_row, weight, case.exact(weight, left, right)) == [float("inf")]
    assert seen == [True]
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize("wrong", ["garbage", "nan", "shape", "dtype", "strides", "raises"])
def test_a_wrong_backend_gets_a_reason_and_no_times(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {
        "garbage": lambda W, dtype: reference.transpose_cast(W, dtype) + 1e-3,
        "nan": lambda W, dtype: reference.transpose_cast(W, dtype).fill_(float("nan")),
        "shape": lambda W, dtype: W.to(dtype),
        "dtype": lambda W, dtype: W.mT.contiguous(),
        "strides": lambda W, dtype: W.to(dtype).mT,
    }

    def body(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if wrong == "raises":
            raise RuntimeError(f"no such kernel in {Path.home()}")
        return results[wrong](weight, dtype)

    triton = pytest.importorskip("pissa_kernels.ops.triton")
    monkeypatch.setattr(triton, "transpose_cast", body)
    monkeypatch.setattr(triton, "unsupported_reasons", lambda verb, weight: [])
    out = tmp_path / "rows.jsonl"
    assert main(["kernels", "--repeats", "1", "--out", str(out), "--only", "transpose"]) == 1
    rows = {row["provider"]: row for row in read_rows(out)}
    assert not rows["ours triton"]["ok"]
    assert rows["ours triton"]["reason"]
    assert "/" not in rows["ours triton"]["reason"], "an exception's message may hold paths"
    assert rows["ours triton"]["min_ms"] is None
    assert rows["ours torch"]["ok"]
    assert "red: " in table(list(rows.values()))


def test_both_halves_of_normal_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("pissa_kernels.ops.triton")
    right = reference.normal

    def wrong_first_half(weight: torch.Tensor, X: torch.Tensor, pieces: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        Y, Z = right(weight, X)
        return Y + 1e-3, Z

    monkeypatch.setattr(triton, "normal", wrong_first_half)
    monkeypatch.setattr(triton, "unsupported_reasons", lambda verb, weight: [])
    out = tmp_path / "rows.jsonl"
    assert main(["kernels", "--repeats", "1", "--out", str(out), "--only", "^normal"]) == 1
    assert {row["provider"]: row["ok"] for row in read_rows(out)}["ours triton"] is False


def test_a_reference_that_fails_makes_all_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(reference, "transpose_cast", fails)
    out = tmp_path / "rows.jsonl"
    assert main(["kernels", "--repeats", "1", "--out", str(out), "--only", "^transpose"]) == 1
    rows = read_rows(out)
    assert rows
    assert all(row["min_ms"] is None and "reference verb failed" in row["reason"] for row in rows)


def test_only_chooses_among_providers(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["kernels", "--repeats", "1", "--out", str(out), "--only", "^matmul.*/ours torch$"]) == 0
    assert [(row["verb"], row["provider"]) for row in read_rows(out)] == [("matmul", "ours torch")]


@pytest.mark.parametrize("asked", [True, False])
def test_memory_is_that_of_the_row_and_can_be_left_out(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = VerbCase("subtract_lowrank_", (40, 24), "fp32", columns=16, fan_in_fan_out=True)
    measured = []
    monkeypatch.setattr(run, "CASES", (case,))
    monkeypatch.setattr(memory, "peak_extra_mib", lambda backend, which: measured.append((backend, which)) or 1.5)
    out = tmp_path / "rows.jsonl"
    arguments = ["kernels", "--repeats", "1", "--out", str(out), "--only", "ours torch"]
    assert main([*arguments, *(() if asked else ("--no-memory",))]) == 0
    assert measured == ([("torch", case)] if asked else [])
    assert [row["peak_extra_mib"] for row in read_rows(out)] == ([1.5] if asked else [None])


def test_only_must_leave_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["kernels", "--only", "no such case"])
    assert exit_.value.code == 2
    assert "matches no case and provider of 'kernels'" in capsys.readouterr().err


def test_names_tell_cases_apart() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.slow
def test_memory_of_a_subtraction_is_measured() -> None:
    half, single = (VerbCase("subtract_lowrank_", (2048, 2048), dtype, columns=16) for dtype in ("bf16", "fp32"))
    peak = memory.peak_extra_mib("torch", half)
    if peak is None:
        pytest.skip("the system does not tell")
    assert 3 < peak < 16, "a block of 4 MiB is widened"
    alone = memory.peak_extra_mib("torch", single)
    assert alone is not None
    assert alone < 3, "float32 needs no block"
