"""Layers of equal shape as one batch: accuracy, halving, budgets."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pissa_kernels.adapter.layouts import Layout
from pissa_kernels.factors import Recipe
from pissa_kernels.peft.layers import batches
from pissa_kernels.peft.layers.layer import LayerJob

from ...support.jobs import CPU, Net, assert_accurate, jobs_of, mixed_net, on_call, run


@pytest.mark.parametrize("way", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_accurate(way: str, dtype: torch.dtype) -> None:
    net = mixed_net(dtype)
    weights = {name: layer.weight.detach().clone() for name, layer in net.named_children()}  # type: ignore[operator, union-attr]
    jobs = jobs_of(net)
    planned = batches.plan_batches(jobs, CPU, 1 << 30)
    assert sorted(len(batch) for batch in planned) == [1, 2, 3]
    emitted: list[str | None] = []
    emit = lambda job, report: emitted.append(job.name)  # noqa: E731
    run(planned, way, emit)
    assert sorted(emitted, key=str) == sorted(weights)
    assert_accurate(jobs, weights)


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_a_batch_out_of_memory_is_halved(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = batches.principal_factors_of_batch

    def small_only(stack: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(stack))
        if len(stack) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(stack, *args, **kwargs)

    monkeypatch.setattr(batches, "principal_factors_of_batch", small_only)
    net = Net()
    weights = {name: module.weight.detach().clone() for name, module in net.named_modules() if name.count(".") == 1}  # type: ignore[operator, union-attr]
    jobs = jobs_of(net)
    run_batch(jobs, way)
    assert sizes == [8, 4, 2, 2, 4, 2, 2] or sizes == [8, 8, 4, 2, 2, 4, 2, 2]
    assert_accurate(jobs, weights)


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
def test_halving_a_streamed_batch_does_not_affect_its_neighbors(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(
        batches, "principal_factors_of_batch", on_call(fails, error, batches.principal_factors_of_batch)
    )
    net = Net()
    weights = {name: module.weight.detach().clone() for name, module in net.named_modules() if name.count(".") == 1}  # type: ignore[operator, union-attr]
    jobs = jobs_of(net)
    planned = [jobs[index : index + 2] for index in range(0, 8, 2)]
    done: list[str | None] = []
    batches._streamed(planned, CPU, lambda job, report: done.append(job.name), threading.Event())
    assert sorted(done, key=str) == sorted(weights)
    assert_accurate(jobs, weights)


def run_batch(jobs: list[LayerJob], way: str) -> None:
    run([jobs], way)


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_the_layer_that_fails_is_named_and_the_earlier_ones_are_finished(way: str) -> None:
    net = Net()
    net.layers[5].weight.data[1, 2] = torch.nan
    weights = {name: module.weight.detach().clone() for name, module in net.named_modules() if name.count(".") == 1}  # type: ignore[operator, union-attr]
    jobs = jobs_of(net)
    with pytest.raises(ValueError, match=r"^layer 'layers\.5', weight \(48, 48\): the weight holds NaN"):
        run_batch(jobs, way)
    # the halves run in order, so 0 to 4 are finished
    assert_accurate(jobs[:5], weights)
    for job in jobs[5:]:
        assert torch.equal(job.weight, weights[job.name or ""]) or job.name == "layers.5"


def test_one_layer_out_of_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batches, "principal_factors_of_batch", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"^layer 'layers\.0', weight \(48, 48\): CUDA out of memory"):
        run_batch(jobs_of(Net()), "resident")


@given(st.lists(st.sampled_from([(64, 48), (48, 64), (48, 48)]), min_size=1, max_size=20), st.integers(1, 1 << 26))
def test_batches_hold_every_layer_once_and_fit_the_budget(shapes: list[tuple[int, int]], budget: int) -> None:
    jobs = [FakeJob(shape) for shape in shapes]
    planned = batches.plan_batches(jobs, CPU, budget)  # type: ignore[arg-type]
    assert sorted(id(job) for batch in planned for job in batch) == sorted(map(id, jobs))
    for batch in planned:
        assert len({job.weight.shape for job in batch}) == 1
        assert len(batch) == 1 or batch[0].workspace(CPU, len(batch)) <= budget


class FakeJob:
    transposed, recipe = False, Recipe(4)

    def __init__(self, shape: tuple[int, int]) -> None:
        self.weight = torch.empty(shape)
        self.layout = Layout(SimpleNamespace(fan_in_fan_out=False))

    workspace = LayerJob.workspace
