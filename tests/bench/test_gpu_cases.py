"""The gates of ``bench gpu``: what is wrong is red, and what it measures on is what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from bench.gpu import kernels, smoke
from bench.gpu.case import BatchedCase
from bench.gpu.dense_cases import Eigh, InverseCholesky
from bench.gpu.model import DeviceModel, accuracy, spiked_weight
from bench.gpu.record import ROWS, Recorder, Settings
from bench.gpu.resident import ModelTrial, niter_rejection
from bench.gpu.streamed import PinnedCopies
from bench.gpu.weight_cases import Product, Split, Subtraction, SumOfSquares
from bench.harness.rows import read_rows
from bench.models.injection import OURS, Injection
from bench.models.llama import ModelCase
from pissa_kernels.ops import batched_reference

pytestmark = pytest.mark.usefixtures("own_cache")
CASES = (
    Product(33, 70, "bf16", columns=5, precision=1),
    Product(33, 70, "bf16", columns=5, precision=2, transposed=True, update=True),
    Product(33, 70, "bf16", columns=5, precision=3, shared=True),
    Product(33, 70, "fp16", columns=5, precision=1),
    Product(5, 70, columns=5, kind="gram"),
    Product(70, 6, columns=5, kind="change"),
    Split(33, 5),
    SumOfSquares(33, 70, "fp16"),
    Subtraction(33, 70, "bf16", rank=4),
    Subtraction(33, 70, "fp32", rank=4, transposed=True),
    InverseCholesky(70, 12),
    Eigh(12, 12),
)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder("smoke", Settings(out=str(tmp_path), device="cpu", width=128, inner=192, ranks=(4,)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_error_of_any_kind_is_above_what_is_allowed(case: BatchedCase) -> None:
    inputs = case.inputs("cpu")
    results = case.call(batched_reference, inputs, case.batch)
    own = case.errors(inputs, results)
    assert case.units(own, own) <= 1
    for index in range(len(results)):
        for change in (lambda x: x * 1.02, lambda x: torch.full_like(x, torch.nan)):
            wrong = list(results)
            wrong[index] = change(results[index])
            assert not case.units(case.errors(inputs, tuple(wrong)), own) <= 1


def body(**functions: Any) -> ModuleType:
    """The reference module with some functions replaced."""
    module = ModuleType("tests.body")
    names = ("product", "split", "inverse_cholesky", "eigh", "sum_of_squares", "subtract_lowrank_")
    vars(module).update({name: getattr(batched_reference, name) for name in names} | functions)
    return module


def depends_on_the_batch(weights: Any) -> Any:
    found = batched_reference.sum_of_squares(weights)
    return found * (1 + 2.0**-40 * len(weights.tensors))


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        ({}, None),
        ({"sum_of_squares": lambda weights: 1.1 * batched_reference.sum_of_squares(weights)}, "times what is allowed"),
        ({"sum_of_squares": depends_on_the_batch}, "has other bits than in its batch"),
        ({"sum_of_squares": None}, "raised TypeError"),
    ],
)
def test_what_makes_an_operation_red(
    functions: Any, reason: str | None, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tests.body", body(**functions))
    monkeypatch.setitem(smoke.BODIES, "other", "tests.body")
    monkeypatch.setattr(smoke, "available", lambda device: ["other"])
    smoke.check_batched(SumOfSquares(33, 70, "bf16"), recorder)
    [row] = read_rows(recorder.settings.folder / ROWS)
    assert row["ok"] is (reason is None)
    assert row["reason"] is None or reason in row["reason"]


def test_every_operation_verb_dtype_and_precision_is_in_the_smoke_test() -> None:
    settings = Settings(out=".", width=128, inner=192)
    cases = list(smoke.batched_cases(settings))
    assert len({case.name for case in cases}) == len(cases)
    products = {(case.dtype, case.precision, case.transposed) for case in cases if case.function == "product"}
    assert products >= {("bf16", precision, way) for precision in (1, 2, 3) for way in (False, True)}
    functions = {
        "product",
        "gram",
        "change",
        "split",
        "inverse_cholesky",
        "eigh",
        "sum_of_squares",
        "subtract_lowrank_",
    }
    assert {case.function for case in cases} == functions
    verbs = {case.verb for case in smoke.verb_cases(settings)}
    assert verbs == {"matmul", "rmatmul", "normal", "transpose_cast", "subtract_lowrank_"}


def test_a_kernel_that_is_wrong_is_not_timed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = body(eigh=lambda matrices: tuple(1.1 * part for part in batched_reference.eigh(matrices)))
    monkeypatch.setitem(sys.modules, "tests.body", wrong)
    monkeypatch.setitem(smoke.BODIES, "other", "tests.body")
    monkeypatch.setattr(kernels, "available", lambda device: ["other", "torch"])
    kernels.measure(Eigh(12, 12), 1e9, recorder)
    rows = {row["provider"]: row for row in read_rows(recorder.settings.folder / ROWS)}
    assert set(rows) == {"other", kernels.LINALG}
    assert not rows["other"]["ok"]
    assert "min_ms" not in rows["other"]
    assert rows[kernels.LINALG]["min_ms"] > 0


def test_rates_of_a_product() -> None:
    case = Product(100, 200, "bf16", batch=4, columns=10, precision=2)
    row = kernels.rates(case, "triton", {"triton": 0.5, kernels.CUBLAS: 0.2}, rate=1e9)
    assert row["tflops"] == pytest.approx(2 * 4 * 100 * 200 * 10 * 2 / 0.5e-3 / 1e12)
    assert row["of_cublas"] == pytest.approx(2 * 0.2 / 0.5)
    assert row["of_copy"] == pytest.approx(4 * 100 * 200 * 2 / 0.5e-3 / 1e9)
    row = kernels.rates(Eigh(12, 12), "triton", {"triton": 0.5, kernels.LINALG: 2.0}, rate=1e9)
    assert row == {"min_ms": 0.5, "speedup": 4.0}


def test_weights_have_spikes_over_a_bulk() -> None:
    values = torch.linalg.svdvals(spiked_weight((1024, 768), 3, "cpu").double())
    assert torch.equal(spiked_weight((64, 48), 3, "cpu"), spiked_weight((64, 48), 3, "cpu"))
    for j in (1, 16):
        spike = 9 * j**-0.7
        scale = (1024**0.5 + 768**0.5) ** -2
        expected = ((spike + 1024 * scale) * (spike + 768 * scale) / spike) ** 0.5
        assert float(values[j - 1]) == pytest.approx(expected, rel=0.08)
    assert float(values[60]) < 1.02


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "weight"])
def test_a_model_that_is_wrong_in_one_layer_is_rejected(part: str) -> None:
    base = DeviceModel(ModelCase(1, 128, 192, groups=1, rank=4), "cpu", "cpu")
    subject = Injection(base, OURS)
    subject.restore()
    subject.run()
    assert subject.report is not None
    assert len(subject.report.layers) == 7
    assert accuracy(base).rejection(torch.bfloat16) is None
    layer = base.adapted.base_model.model.model.layers[0].mlp.down_proj
    spoilt = layer.base_layer.weight if part == "weight" else getattr(layer, part)["default"].weight
    spoilt.data[:, 0] *= 1.1
    assert accuracy(base).rejection(torch.bfloat16) is not None
    subject.restore()
    subject.run()
    assert accuracy(base).rejection(torch.bfloat16) is None


def test_our_rounds_have_to_be_as_accurate_as_pefts() -> None:
    base = DeviceModel(ModelCase(1, 128, 192, groups=1, rank=4), "cpu", "cpu")
    subject = Injection(base, OURS)
    subject.restore()
    subject.run()
    found = accuracy(base)
    trials = {
        name: ModelTrial(subject=subject, accuracy=found) for name in ("ours pissa_niter_4", "peft pissa_niter_4")
    }
    assert niter_rejection(trials) is None
    trials["peft pissa_niter_4"].accuracy = type(found)(found.energy_deficit / 2, 0, 0, 1)
    assert "energy deficit" in str(niter_rejection(trials))
    trials["peft pissa_niter_4"].accuracy = None
    assert "no baseline" in str(niter_rejection(trials))


def test_copies_leave_the_weights_as_they_are() -> None:
    weights = [torch.randn(rows, 8).bfloat16() for rows in (4, 6, 2, 6, 5)]
    before = [weight.clone() for weight in weights]
    PinnedCopies(weights, "cpu").run()
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
