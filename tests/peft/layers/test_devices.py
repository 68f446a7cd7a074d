"""Models that are streamed through several GPUs at the same time: results, threads, failures, pinned memory.

The GPUs are names; what is streamed to them goes through the CPU, in the threads and the order of a run on GPUs.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.peft.layers import batches, schedule
from pissa_kernels.peft.layers.layer import LayerJob

from ...support.adapted import assert_same, config, lora_layers, state
from ...support.gpus import GPUS, PATIENCE, Gpus
from ...support.jobs import CPU, Net, assert_accurate, inject, jobs_of, mixed_net, on_call
from ...support.models import build
from .test_batch_failures import assert_finished_or_unchanged

PLENTY = 1 << 30
NAMES = [str(gpu) for gpu in GPUS]


def one_at_a_time(jobs: list[LayerJob]) -> int:
    """A budget with which each batch has one layer, of the largest ones at least."""
    return max(batches.needed_bytes(job, GPUS[0]) for job in jobs)


def without_times(report: pk.Report) -> list[dict[str, Any]]:
    return [
        vars(layer) | {"seconds": None, "singular_values": layer.singular_values.tolist()} for layer in report.layers
    ]


# Results


@pytest.mark.parametrize("way", ["any method", "fixed schedule"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_gpus(
    way: str, dtype: torch.dtype, gpus: Gpus, request: pytest.FixtureRequest
) -> None:
    if way == "fixed schedule":
        request.getfixturevalue("fixed_schedule")
    base = build("llama", dtype, width=256)
    states, reports = [], []
    for device in ("cuda", NAMES[:1], NAMES[:2], NAMES):
        with pk.patch_peft(device=device, memory_budget=PLENTY) as report:
            states.append(state(peft.get_peft_model(copy.deepcopy(base), config("llama", r=8))))
        reports.append(report)
    assert len(gpus.batches[GPUS[2]]) >= 2  # the last run only
    for found, report in zip(states, reports, strict=True):
        assert_same(found, states[0])
        assert len(report.layers) == 14
        assert without_times(report) == without_times(reports[0])


def test_layers_of_a_report_are_in_the_order_of_the_model(gpus: Gpus) -> None:
    finished: list[str | None] = []
    net = mixed_net()
    names = [name for name, _ in net.named_children()]
    settings = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=names)
    with pk.patch_peft(
        device=NAMES, memory_budget=PLENTY, on_layer=lambda layer: finished.append(layer.name)
    ) as report:
        peft.get_peft_model(net, settings)
    assert [layer.name for layer in report.layers] == names
    assert sorted(map(str, finished)) == sorted(names)
    assert sorted(str(name) for each in gpus.batches.values() for batch in each for name in batch) == names
    # three of 64×48, two of 48×64, one of 48×48: equal shapes are one batch on each GPU
    assert all(len(each) <= 3 for each in gpus.batches.values())


# Threads


def test_all_gpus_work_at_the_same_time_on_the_streams_of_the_caller(gpus: Gpus) -> None:
    gpus.together = 3  # each waits for the others
    jobs = jobs_of(Net())
    weights = {job.name or "": job.weight.clone() for job in jobs}
    done: list[LayerJob] = []
    schedule.run(jobs, schedule.Resources(GPUS, PLENTY), lambda job, report: done.append(job))
    assert sorted(done, key=jobs.index) == jobs
    assert_accurate(jobs, weights)
    assert len({thread for thread, _ in gpus.threads.values()} | {threading.get_ident()}) == 4
    assert {gpu: stream for gpu, (_, stream) in gpus.threads.items()} == gpus.streams
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pissa_kernels")]


def test_gpus_start_though_there_are_more_layers_on_the_cpu_than_threads(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers on the CPU wait for the GPU here, so a GPU that waited for their threads would never start."""
    jobs = jobs_of(Net())
    weights = {job.name or "": job.weight.clone() for job in jobs}
    monkeypatch.setattr(schedule, "divide", lambda jobs, devices, budget: {CPU: jobs[:6], GPUS[0]: jobs[6:]})
    real, waited = LayerJob.run, []

    def after_the_gpu(self: LayerJob, *args: Any) -> Any:
        started.wait(PATIENCE)
        waited.append(started.is_set())
        return real(self, *args)

    started = threading.Event()
    monkeypatch.setattr(LayerJob, "run", after_the_gpu)
    monkeypatch.setattr(gpus, "started", lambda *args: started.set())
    schedule.run(jobs, schedule.Resources(GPUS, PLENTY), lambda job, report: None)
    assert waited == [True] * 6
    assert_accurate(jobs, weights)


# Failures


def test_an_error_on_one_gpu_stops_the_others_after_their_batch(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(Net())
    weights = {job.name or "": job.weight.clone() for job in jobs}
    real, calls = batches.principal_factors_of_batch, dict.fromkeys(GPUS, 0)

    def failing(views: Any, recipes: Any) -> Any:
        gpu = gpus.current()
        calls[gpu] += 1
        if gpu == GPUS[0] and calls[gpu] == 2:
            raise RuntimeError("CUDA error: misaligned address")
        if gpu != GPUS[0]:
            assert gpus.stop is not None
            assert gpus.stop.wait(PATIENCE)  # the first batch is in progress when the other GPU fails
        return real(views, recipes)

    monkeypatch.setattr(batches, "principal_factors_of_batch", failing)
    done: list[LayerJob] = []
    resources = schedule.Resources(GPUS[:2], one_at_a_time(jobs))
    with pytest.raises(RuntimeError, match=r"^layer 'layers\.2', weight \(48, 48\): CUDA error: misaligned address$"):
        schedule.run(jobs, resources, lambda job, report: done.append(job))
    assert calls == {GPUS[0]: 2, GPUS[1]: 1, GPUS[2]: 0}
    assert {job.name for job in done} == {"layers.0", "layers.1"}
    assert_finished_or_unchanged(jobs, weights, done)


FAILURES = [RuntimeError("no luck"), MemoryError("no room"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["arriving", "decomposed", "leaving"])
@pytest.mark.parametrize("number", [1, 4, 8])
def test_after_a_failure_every_layer_is_finished_or_unchanged_and_a_second_call_does_the_rest(
    number: int, where: str, error: BaseException, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Net()
    with pk.patch_peft(device="cuda", memory_budget=PLENTY):
        undisturbed = state(inject(Net()))
    owner, function = {
        "arriving": (batches.PinnedTransfer, "to_device"),
        "decomposed": (batches, "principal_factors_of_batch"),
        "leaving": (LayerJob, "write"),
    }[where]
    named = None if isinstance(error, KeyboardInterrupt) else r"^layer 'layers\.\d', weight \(48, 48\): no "
    net = Net()
    budget = one_at_a_time(jobs_of(Net()))
    with pk.patch_peft(device=NAMES, memory_budget=budget) as report:
        with monkeypatch.context() as patched:
            patched.setattr(owner, function, on_call(number, error, getattr(owner, function)))
            with pytest.raises(type(error), match=named):
                inject(net)
        done = {layer.name for layer in report.layers}
        assert len(done) < 8
        for name, layer in lora_layers(net).items():
            weight, A, B = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if name in done:
                assert_same({name: (weight, A, B)}, {name: undisturbed[name]})
            else:
                assert torch.equal(weight, original.get_submodule(name).weight)
                assert not B.any()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
            finished = inject(net)
    assert_same(state(finished), undisturbed)


def test_a_refused_weight_is_named_though_its_batch_is_one_of_several(gpus: Gpus) -> None:
    net = Net()
    net.layers[5].weight.data[1, 2] = torch.nan
    jobs = jobs_of(net)
    weights = {job.name or "": job.weight.clone() for job in jobs}
    done: list[LayerJob] = []
    with pytest.raises(ValueError, match=r"^layer 'layers\.5', weight \(48, 48\): the weight holds NaN"):
        schedule.run(jobs, schedule.Resources(GPUS, PLENTY), lambda job, report: done.append(job))
    del weights["layers.5"]
    assert jobs[5] not in done
    assert_finished_or_unchanged(jobs[:5] + jobs[6:], weights, done)


def test_an_error_that_no_layer_can_be_blamed_for_names_the_batch(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(batches, "principal_factors_of_batch", fail)
    message = r"^layer 'layers\.\d', weight \(48, 48\) or one of the 3 others in its batch: CUDA error"
    with pytest.raises(RuntimeError, match=message):
        schedule.run(jobs_of(Net()), schedule.Resources(GPUS[:2], PLENTY), lambda job, report: None)


def test_a_budget_too_small_for_every_gpu_is_refused_before_anything_is_written(gpus: Gpus) -> None:
    jobs = jobs_of(Net())
    weights = {job.name or "": job.weight.clone() for job in jobs}
    budget = one_at_a_time(jobs) - 1
    with pytest.raises(ValueError, match=rf"^layer 'layers\.0', .* on cuda:0 beyond .* the budget of {budget:,}; "):
        schedule.run(jobs, schedule.Resources(GPUS, budget), lambda job, report: None)
    assert_finished_or_unchanged(jobs, weights, [])
    assert not gpus.batches


# Pinned memory


@pytest.mark.parametrize("halved", [False, True])
def test_buffers_for_copies_are_four_for_each_gpu_and_eight_where_batches_are_halved(
    halved: bool, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, peak, lock = 0, 0, threading.Lock()
    empty = torch.empty

    def gone() -> None:
        nonlocal now
        with lock:
            now -= 1

    def counted(*size: Any, **rest: Any) -> Any:
        nonlocal now, peak
        found = empty(*size, **rest)
        if "pin_memory" in rest:
            weakref.finalize(found, gone)
            with lock:
                now += 1
                peak = max(peak, now)
        return found

    real = batches.principal_factors_of_batch

    def small_only(views: Any, recipes: Any) -> Any:
        if halved and len(views) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(views, recipes)

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(batches, "principal_factors_of_batch", small_only)
    jobs = [*jobs_of(mixed_net()), *jobs_of(Net()), *jobs_of(Net())]
    gpus.together = 3
    slow = threading.Event()
    schedule.run(jobs, schedule.Resources(GPUS, PLENTY), lambda job, report: slow.wait(0.002) and None)
    assert 4 <= peak <= len(GPUS) * (8 if halved else 4)
    assert now == 0
