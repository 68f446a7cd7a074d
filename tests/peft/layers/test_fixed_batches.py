"""Batches through the fixed schedule of GPUs, on CPU tensors: bits, accuracy, memory, waiting of the host."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bench.ledger.events import Sizes
from bench.ledger.recorder import recording
from bench.ledger.run import stand_ins
from pissa_kernels.factors import Recipe
from pissa_kernels.peft.layers import batches
from pissa_kernels.peft.layers.initialize import prepare
from pissa_kernels.peft.layers.layer import LayerJob
from pissa_kernels.peft.weights import record
from pissa_kernels.runtime.workers import InOrder
from pissa_kernels.svd import cost, fixed

from ...support.adapted import assert_same, state
from ...support.jobs import CPU, assert_accurate, run
from ...support.live import live_bytes
from ...support.reference import realistic

pytestmark = [
    pytest.mark.usefixtures("fixed_schedule"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
WAYS = pytest.mark.parametrize("way", ["resident", "streamed"])
RANK = 4
PLENTY = 1 << 30


class Net(nn.Module):
    """Four linear layers, two of them wide, and three layers whose weights are transposed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made = [nn.Linear(150, 160, bias=False), nn.Linear(150, 160, bias=False)]
        made += [nn.Linear(160, 150, bias=False), nn.Linear(160, 150, bias=False)]
        self.layers = nn.ModuleList([*made, *(Conv1D(160, 150) for _ in range(3))])
        for index, layer in enumerate(self.layers):
            layer.weight.data = realistic(*layer.weight.shape, seed=index).to(dtype)


def jobs_of(net: nn.Module) -> list[LayerJob]:
    names = [str(index) for index in range(len(net.layers))]  # type: ignore[arg-type]
    settings: dict[str, Any] = {"r": RANK, "init_lora_weights": True, "target_modules": names}
    peft.get_peft_model(net, peft.LoraConfig(**settings))
    jobs = [
        prepare(layer, "default", "pissa", name=f"layers.{name}") for name, layer in zip(names, net.layers, strict=True)
    ]  # type: ignore[call-overload]
    return [job for job in jobs if job is not None]


def weights_of(jobs: list[LayerJob]) -> dict[str, torch.Tensor]:
    return {job.name or "": job.weight.clone() for job in jobs}


# Results


@WAYS
@DTYPES
def test_every_layer_is_accurate(dtype: torch.dtype, way: str) -> None:
    jobs = jobs_of(Net(dtype))
    weights, reports = weights_of(jobs), {}
    planned = batches.plan_batches(jobs, CPU, PLENTY)
    assert [len(batch) for batch in planned] == [2, 2, 3]
    run(planned, way, lambda job, report: reports.__setitem__(job, report))
    assert [(report.certificate.method, report.certificate.converged) for report in reports.values()] == 7 * [
        ("fixed", True)
    ]
    assert_accurate(jobs, weights)
    for job in jobs:
        kept = record.of_adapter(job.layer, "default")
        assert kept is not None
        assert torch.equal(kept.before, record.fingerprint(weights[job.name or ""]))
        assert torch.equal(kept.after, record.fingerprint(job.weight))
        assert torch.equal(kept.lora_A.float(), job.layer.lora_A["default"].weight)
        assert torch.equal(kept.lora_B.float(), job.layer.lora_B["default"].weight)
        # a view would keep, and pickle, the whole batch
        tensors = (kept.lora_A, kept.lora_B, kept.before, kept.after, kept.report.singular_values)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_company_or_memory(dtype: torch.dtype, way: str) -> None:
    one, other = Net(dtype), Net(dtype)
    together, alone = jobs_of(one), jobs_of(other)
    run(batches.plan_batches(together, CPU, PLENTY), way)
    planned = batches.plan_batches(alone, CPU, 1)
    assert [len(batch) for batch in planned] == 7 * [1]
    run(planned, way)
    assert_same(state(one), state(other))
    for job, same in zip(together, alone, strict=True):
        kept, also = (record.of_adapter(each.layer, "default") for each in (job, same))
        assert kept is not None
        assert also is not None
        assert torch.equal(kept.report.singular_values, also.report.singular_values)
        assert kept.report.certificate == also.report.certificate


# Layers that differ from their company


def test_layers_with_given_factors_and_reused_ones_leave_the_others_to_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs, first = jobs_of(Net())[4:], jobs_of(Net())[4:]
    weights = weights_of(jobs)
    run([first], "resident")
    given = record.of_adapter(first[0].layer, "default")
    jobs[0] = replace(jobs[0], given=given)
    run([jobs[1:2]], "resident")
    residual = jobs[1].weight.clone()
    sizes: list[int] = []
    real = batches.principal_factors_of_batch
    monkeypatch.setattr(
        batches, "principal_factors_of_batch", lambda views, recipes: sizes.append(len(views)) or real(views, recipes)
    )
    emitted: list[LayerJob] = []
    run([jobs], "resident", lambda job, report: emitted.append(job))
    assert sizes == [1]
    assert emitted == jobs
    assert torch.equal(jobs[1].weight, residual)
    assert_accurate(jobs, weights)
    for job, other in zip(jobs, first, strict=True):
        assert torch.equal(job.weight, other.weight)


@WAYS
def test_given_factors_of_another_weight_are_refused_by_name(way: str) -> None:
    jobs, first = jobs_of(Net()), jobs_of(Net())
    weights = weights_of(jobs)
    run([first[:2]], "resident")
    jobs[1] = replace(jobs[1], given=record.of_adapter(first[0].layer, "default"))
    with pytest.raises(ValueError, match=r"^layer 'layers\.1', weight \(160, 150\): the weight is not the one that"):
        run([jobs[:2]], way) if way == "resident" else batches._without_reused(jobs[:2], lambda job, report: None)
    assert all(torch.equal(job.weight, weights[job.name or ""]) for job in jobs)


@WAYS
def test_factors_beyond_the_range_of_their_dtype_are_refused_by_name(way: str) -> None:
    jobs = jobs_of(Net(torch.float16))[4:]
    weights = weights_of(jobs)
    jobs[1] = replace(jobs[1], recipe=Recipe(RANK, scaling=1e-12))
    emitted: list[LayerJob] = []
    with pytest.raises(ValueError, match=r"^layer 'layers\.5', weight .*: the factors .* leave the range of .*float16"):
        run([jobs], way, lambda job, report: emitted.append(job))
    assert emitted == jobs[:1]
    assert_accurate(emitted, weights)
    for job in jobs[1:]:
        assert torch.equal(job.weight, weights[job.name or ""])
        assert not job.layer.lora_B["default"].weight.any()


# Memory and waiting


class Equal(nn.Module):
    """Six layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(150, 160, bias=False) for _ in range(6))
        for index, layer in enumerate(self.layers):
            layer.weight.data = realistic(160, 150, seed=index).bfloat16()  # type: ignore[assignment]


@WAYS
@pytest.mark.parametrize("most", [1, 2, 3])
def test_batches_stay_within_their_budget(most: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ROW_BLOCK_BYTES", dict.fromkeys(cost.ROW_BLOCK_BYTES, 0))  # more than these weights
    jobs = jobs_of(Equal())
    each, stacks = jobs[0].workspace(CPU), 0
    if way == "streamed":
        stacks = batches.IN_FLIGHT * jobs[0].weight.nbytes
        monkeypatch.setattr(LayerJob, "workspace", lambda job, device, batch=1: batch * each)
    budget = most * (each + stacks)
    elsewhere = torch.device("meta") if way == "streamed" else CPU
    planned = batches.plan_batches(jobs, elsewhere, budget)
    assert [len(batch) for batch in planned] == (6 // most) * [most]
    adapters = [factors["default"].weight for job in jobs for factors in (job.layer.lora_A, job.layer.lora_B)]
    with live_bytes(*(job.weight for job in jobs), *adapters) as live:
        # slowly, so that the results of a batch leave while the next one is decomposed
        run(planned, way, lambda job, report: time.sleep(0.02))
    # this thread makes no stacks
    assert 0.3 * budget <= live.peak + most * stacks <= budget


def on_a_stand_in(weight: torch.Tensor) -> LayerJob:
    base = SimpleNamespace(weight=SimpleNamespace(data=weight))
    # not parameters, which take no stand-ins
    A, B = ({"default": SimpleNamespace(weight=SimpleNamespace(data=None, is_meta=False))} for _ in range(2))
    layer = SimpleNamespace(get_base_layer=lambda: base, lora_A=A, lora_B=B, fan_in_fan_out=False)
    layer.__dict__.update(_forward_hooks={}, register_forward_hook=lambda *args, **kwargs: None)
    return LayerJob(layer, "default", Recipe(RANK), name="q")


class Taken:
    """A HostCopy that has been made at once."""

    def __init__(self, tensors: list[Any]) -> None:
        self.tensors = [tensor.values.clone() for tensor in tensors]

    def result(self) -> list[torch.Tensor]:
        return self.tensors


@pytest.mark.parametrize("batch", [2, 5])
def test_the_host_waits_a_few_times_for_a_batch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the figures of the certificates, once for the range of the factors; results leave in another thread."""
    monkeypatch.setattr(batches, "HostCopy", Taken)
    monkeypatch.setattr(fixed, "DEVICES", ("cuda",))
    sizes = Sizes(batch, 157, 151)
    jobs = [on_a_stand_in(weight) for weight in stand_ins(sizes)]
    certificates = []
    with InOrder("test") as leaving, recording(sizes) as recorded:
        batches._resident(jobs, lambda job, report: certificates.append(report.certificate), leaving)
    assert [(each.method, each.converged) for each in certificates] == batch * [("fixed", True)]
    assert sum(times for event, times in recorded.events.items() if event.waits) <= 3
