"""The ledger: what it counts on stand-ins for a GPU, and how it scales the counts to real models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.__main__ import main
from bench.ledger import run
from bench.ledger.events import Dim, Event, Line, Operand, Sizes, linear
from bench.ledger.models import MODELS
from bench.ledger.recorder import OTHER, recording
from bench.ledger.roofline import H100, Roofline
from bench.ledger.standin import StandIn
from pissa_kernels.ops import dispatch
from pissa_kernels.ops.batched import Panel, Update, Weights

SIZES = Sizes(batch=5, m=149, n=131)
REAL = {"batch": 32, "m": 11008, "n": 4096}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SMALL", SIZES.n)
    monkeypatch.setattr(run, "LARGE", SIZES.m)


def subspace_step(weights: list[Tensor], rank: int) -> None:
    """One step of subspace iteration with an orthonormalization, and a subtraction."""
    batch = Weights.of(weights)
    body = dispatch.bodies(batch)
    rows = weights[0].shape[0]
    sketch = torch.randn(rows, rank).pin_memory().to(batch.device, non_blocking=True)
    pieces = body.split(sketch, 1)[:, None].expand(-1, len(weights), -1, -1)
    X = body.product(batch.mT, Panel(None, pieces), precision=1).values
    update = Update(torch.ones(len(weights), device=batch.device), 0.5, X)
    X = body.product(batch.mT, body.product(batch, X, precision=2), precision=2, update=update, pieces=2).values
    change, diagonal = body.inverse_cholesky(body.product(X.mT, X, precision=3).values, 1e-6)
    Q = body.product(X, change, precision=3).values
    if diagonal.amin().item() > 0:
        left = torch.zeros(len(weights), rows, rank, device=batch.device)
        scalings = torch.ones(len(weights), dtype=torch.float64)
        body.subtract_lowrank_(batch, left, Q.mT, scalings)
    for weight in weights:
        weight.clone()


def lines(rank: int = 16, batch: int = 5) -> dict[str, Line]:
    sizes = Sizes(batch, SIZES.m, SIZES.n)
    with recording(sizes) as record:
        subspace_step(list(run.stand_ins(sizes)), rank)
    found: dict[str, Line] = {}
    for event, times in record.events.items():
        found[event.part] = found.get(event.part, Line()) + H100.line(event, times, REAL)
    return found


def test_operations_are_counted_in_the_sizes_of_the_real_weights() -> None:
    found = lines()
    B, m, n, r = 32, 11008, 4096, 16
    products = found["products with weights"]
    assert products.launches == 3
    assert products.flops["bf16"] == 2 * B * m * n * r * (1 + 2 + 2)
    sketched = 2 * m * r + 4 * B * n * r  # all weights have the same sketch
    applied = 2 * (2 * B * n * r) + 4 * B * m * r
    updated = 2 * (2 * B * m * r) + 4 * B + 4 * B * n * r + (4 * B * n * r + 2 * (2 * B * n * r))
    assert products.bytes == 3 * 2 * B * m * n + sketched + applied + updated
    # splits of the sketch, which has no batch, and of six panels; a Gram matrix and a change of basis of three pieces
    assert found["products of panels"].launches == 7 + 2
    assert found["products of panels"].flops["bf16"] == 2 * 6 * B * n * r * r * 2
    assert found["inverse_cholesky"].launches == 1
    assert found["subtract_lowrank_"].flops["bf16"] == 2 * B * m * n * r
    assert found["subtract_lowrank_"].bytes == 4 * B * m * n + 4 * B * r * (m + n)
    copies = found["copies to and from the host"]
    assert copies.waits == 1
    assert copies.transferred == 8 * B + 4 * m * r + 4
    # ones, zeros, amin, and a copy of each stand-in
    assert found[OTHER].launches == 3 + 5


def test_what_each_weight_costs_is_told_from_what_a_batch_costs() -> None:
    found = run.recorded(subspace_step, "tall", 16)
    assert [times for event, times in found.items() if event.name == "clone"] == [(0, 1)]
    assert all(each == 0 and fixed > 0 for event, (fixed, each) in found.items() if event.name != "clone")
    a, b = Event("p", "a"), Event("p", "b")
    assert linear({a: 7, b: 3}, {a: 9}, (5, 7)) == {a: (2, 1), b: (10.5, -1.5)}


def test_stand_ins_behave_like_tensors_on_a_gpu() -> None:
    with recording(SIZES) as record:
        x = StandIn(torch.zeros(SIZES.batch, SIZES.n))
        assert (x.is_cuda, x.device.type, x.is_meta) == (True, "cuda", False)
        part = x[1:3].mT
        part += 2
        assert x.sum().item() == 4 * SIZES.n
        assert x.add_(1) is x
        made = torch.arange(3, device=x.device) + x.new_ones(3)
        assert made.device == x.device
        assert x.tolist()[0][:2] == [1, 1]
        assert torch.equal(x.cpu(), x.values)
        assert type(x.cpu()) is Tensor
        host = torch.ones(2, dtype=torch.float64)
        assert host.to(x.device, torch.float32).dtype == torch.float32
        assert host.cuda().is_cuda
        assert host.to(torch.float32).device.type == "cpu"
        assert x.to(torch.float16).dtype == torch.float16
        assert bool((x > 0).any())
        stacked = torch.stack([x, x])
        stacked[0] = 5
        assert float(stacked.amax()) == 5
    names = [event.name for event in record.events.elements() if not event.transfer]
    assert names.count("add_") == 2
    assert "transpose" not in names
    assert sum(times for event, times in record.events.items() if event.waits) == 6
    assert sum(times for event, times in record.events.items() if event.name == "copy to the GPU") == 2
    with pytest.raises(RuntimeError, match="outside of a recording"):
        x + 1


def test_a_size_is_recognized_by_its_prime_factor() -> None:
    assert SIZES.shape((5, 149, 131, 262, 16, 1, 0)) == (
        Dim(1, "batch"),
        Dim(1, "m"),
        Dim(1, "n"),
        Dim(2, "n"),
        Dim(16),
        Dim(1),
        Dim(0),
    )


def test_an_operation_takes_the_longest_of_memory_arithmetic_and_steps() -> None:
    flops = {"bf16": 10.0, "tf32": 5.0, "fp32": 1.0}
    roofline = Roofline("toy", memory=100.0, flops=flops, launch=1.0, step=0.1, bus=2.0)
    operand = Operand((Dim(1, "m"), Dim(3)), 2)
    event = Event("p", "x", (operand,), (("bf16", (Dim(1, "n"), Dim(4))),))
    assert operand.bytes({"m": 50}) == 300
    assert roofline.line(event, 2, {"m": 50, "n": 5}).seconds == 2 * 3
    assert roofline.line(event, 2, {"m": 50, "n": 50}).seconds == 2 * 20
    assert roofline.line(replace(event, steps=70), 2, {"m": 50, "n": 5}).seconds == 2 * 7
    assert roofline.line(Event("p", "copy", (operand,), transfer=True), 1, {"m": 50}).seconds == 150


@pytest.mark.parametrize(
    ("name", "weights", "elements"),
    [
        ("llama-2-7b", 224, 6_476_005_376),
        ("llama-3-8b", 224, 6_979_321_856),
        ("mistral-7b", 224, 6_979_321_856),
        ("llama-2-70b", 560, 68_451_041_280),
        ("llama-3.1-405b", 882, 401_646_551_040),
    ],
)
def test_models_have_their_linear_layers(name: str, weights: int, elements: int) -> None:
    shapes = MODELS[name].shapes
    assert sum(shapes.values()) == weights
    assert sum(m * n * count for (m, n), count in shapes.items()) == elements
    assert MODELS[name].bytes == 2 * elements


def test_the_initializer_runs_on_stand_ins() -> None:
    found = run.recorded(run.initialize, "wide", 4)
    assert any(event.part == "subtract_lowrank_" for event in found)
    assert any(event.waits for event in found)


def test_a_ledger_of_a_model(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "initialize", subspace_step)
    out = tmp_path / "ledger.jsonl"
    assert main(["ledger", "--models", "llama-2-7b", "--ranks", "16", "--out", str(out)]) == 0
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    model = MODELS["llama-2-7b"]
    total = sum(run.ledger(subspace_step, model, 16, 32, H100).values(), Line())
    inner = sum(count * shape[1] for shape, count in model.shapes.items())
    panels = 2 * 6 * inner * 16 * 16 * 2
    assert total.flops["bf16"] == pytest.approx(2 * 16 * (5 + 1) * model.bytes / 2 + panels)
    assert row["device"] == H100.name
    assert row["resident_s"] == pytest.approx(max(total.seconds, total.launches * H100.launch))
    assert row["streamed_s"] == pytest.approx(max(row["resident_s"], model.bytes / H100.bus))
    text = capsys.readouterr().out
    assert "products with weights" in text
    # 128, 64 and 32 weights of each shape, 32 at a time, and the copies of each weight
    assert total.launches == pytest.approx((4 + 2 + 1) * (3 + 9 + 1 + 1 + 3) + 224)
