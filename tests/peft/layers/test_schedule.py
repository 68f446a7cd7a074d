"""Layers initialized together: results, failures, and a second call that completes the first."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.peft.layers import batches, schedule, writing
from pissa_kernels.peft.layers import layer as layer_module
from pissa_kernels.peft.layers.layer import LayerJob

from ...support.adapted import assert_same, config, lora_layers, moved, state
from ...support.jobs import CPU, NAMES, Net, inject, jobs_of, on_call
from ...support.models import build, linear_weights
from ...support.reference import energy_deficit
from ...support.streams import DEVICE, Stream, Streams


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_together_and_one_by_one_agree_bit_for_bit(name: str, dtype: torch.dtype, two_threads: None) -> None:
    """Each layer runs on one thread in both cases, so the results are equal."""
    base = build(name, dtype, width=256)
    with pk.patch_peft() as together:
        one = peft.get_peft_model(copy.deepcopy(base), config(name, r=8))
    torch.set_num_threads(1)
    with pk.patch_peft(batch=False) as alone:
        other = peft.get_peft_model(copy.deepcopy(base), config(name, r=8))
    assert_same(state(one), state(other))
    assert [layer.name for layer in together.layers] == [layer.name for layer in alone.layers]
    assert together.peak_extra_bytes is None or together.peak_extra_bytes >= 0
    assert together.seconds is not None


def test_the_number_of_threads_is_restored(two_threads: None) -> None:
    with pk.patch_peft():
        peft.get_peft_model(build("llama"), config("llama"))
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pissa_kernels")]


def test_a_dora_magnitude_is_computed_from_a_finished_layer() -> None:
    base = build("llama")
    weights = {name: weight.detach().double() for name, weight in linear_weights(copy.deepcopy(base), "llama")}
    with pk.patch_peft():
        model = peft.get_peft_model(base, config("llama", use_dora=True))
    for name, layer in lora_layers(model).items():
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
        # DoRA takes the norm of W_res + s·B·A, which is W
        assert moved(weights[name].norm(dim=1), magnitude) <= 1e-6


FAILURES = [RuntimeError("no luck"), MemoryError("no room"), torch.OutOfMemoryError("no room"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["principal_factors", "subtract_lowrank_"])
@pytest.mark.parametrize("number", [1, 4, 8])
def test_after_a_failure_every_layer_is_finished_or_unchanged(
    number: int, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    original, net = Net(), Net()
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    with pk.patch_peft():
        undisturbed = state(inject(Net()))
    owner = layer_module if where == "principal_factors" else writing.ops
    named = None if isinstance(error, KeyboardInterrupt) else r"^layer 'layers\.\d', weight \(48, 48\): no "
    with pk.patch_peft() as report:
        with monkeypatch.context() as patched:
            patched.setattr(owner, where, on_call(number, error, getattr(owner, where)))
            with pytest.raises(type(error), match=named):
                inject(net)
        done = {layer.name for layer in report.layers}
        assert len(done) < 8
        for name, layer in lora_layers(net).items():
            W = original.get_submodule(name).weight.double()
            weight, A, B = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if name in done:
                assert_same({name: (weight, A, B)}, {name: undisturbed[name]})
            else:
                assert torch.equal(weight.double(), W)
                assert not B.any()
        with torch.no_grad():
            assert moved(original(x).double(), net(x).double()) <= 1e-5
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
            finished = inject(net)
    assert_same(state(finished), undisturbed)
    assert {layer.name for layer in report.layers[len(done) :]} == {f"layers.{name}" for name in NAMES}


def test_an_error_of_the_callback_stops_the_work_between_layers(two_threads: None) -> None:
    def fail(layer: pk.LayerReport) -> None:
        raise RuntimeError("disk full")

    net, original = Net(), Net()
    with pytest.raises(RuntimeError, match="disk full"), pk.patch_peft(on_layer=fail) as report:
        inject(net)
    assert 1 <= len(report.layers) < 8
    x = torch.eye(48)
    with torch.no_grad():
        assert moved(original(x).double(), net(x).double()) <= 1e-5


def test_a_refused_layer_leaves_the_earlier_ones_unchanged() -> None:
    """Checks that need no arithmetic run while PEFT creates the layers, before anything is written."""
    net, original = Net(), Net()
    net.layers[5].weight.data = net.layers[5].weight.data.double()
    with pytest.raises(TypeError, match=r"layer 'layers\.5'"), pk.patch_peft() as report:
        inject(net)
    assert report.layers == []
    for name, layer in lora_layers(net).items():
        assert torch.equal(layer.get_base_layer().weight, original.get_submodule(name).weight)


def test_a_second_call_with_another_rank_initializes_again() -> None:
    """A second call repeats records of the same settings only; with others it starts from the original weight."""
    net = Net()
    original = net.layers[0].weight.detach().clone()
    with pk.patch_peft(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject(net)
        residual = net.layers[0].get_base_layer().weight.detach().clone()
        peft.get_peft_model(net, peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=NAMES))
    layer = net.layers[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert energy_deficit(original, A) <= 1e-6
    assert not torch.equal(residual, layer.get_base_layer().weight)
    sum_of_both = layer.get_base_layer().weight + layer.scaling["default"] * B @ A
    assert torch.allclose(sum_of_both, original, rtol=0, atol=1e-6 * float(original.abs().max()))


# The caller's stream


def test_work_on_a_gpu_runs_on_the_stream_of_the_caller(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """In threads of its own, whose current stream would be the default one."""
    seen: list[tuple[bool, Stream]] = []

    def run_batches(batches: list[list[LayerJob]], device: torch.device, emit: Any, stop: threading.Event) -> None:
        seen.append((threading.current_thread() is threading.main_thread(), streams.current(device)))

    monkeypatch.setattr(schedule, "run_batches", run_batches)
    caller = Stream(name="caller")
    resources = schedule.Resources((DEVICE,), memory_budget=1 << 30)
    for stream in (caller, streams.default):
        with streams.use(stream):
            schedule.run(jobs_of(Net()), resources, lambda job, report: None)
    assert seen == [(False, caller), (False, streams.default)]


# Budgets


def test_a_budget_too_small_is_refused_before_anything_is_written() -> None:
    net, original = Net(), Net()
    refusal = r"^layer 'layers\.0', weight \(48, 48\): the SVD needs [\d,]+ bytes on cpu.* 1,000; "
    with pytest.raises(ValueError, match=refusal), pk.patch_peft(memory_budget=1000):
        inject(net)
    x = torch.eye(48)
    assert torch.equal(original(x), net(x))


def test_a_layer_that_is_streamed_needs_room_for_the_stacks_in_flight() -> None:
    job, device = jobs_of(Net())[0], torch.device("meta")
    needed = job.workspace(device) + batches.IN_FLIGHT * job.weight.nbytes
    schedule._check_budget([job], device, needed)
    with pytest.raises(ValueError, match=f"pass a memory_budget of at least {needed:,}"):
        schedule._check_budget([job], device, needed - 1)
    schedule._check_budget([job], CPU, job.workspace(CPU))


def test_the_budget_bounds_the_number_of_layers_at_once(two_threads: None) -> None:
    jobs = jobs_of(Net())
    each = jobs[0].workspace(CPU)
    assert schedule._workers(jobs, 10 * each) == 2
    assert schedule._workers(jobs, 2 * each - 1) == 1
    assert schedule._workers(jobs[:1], 10 * each) == 1


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="memory_budget must be a number of bytes above 0, got 0"):
        pk.patch_peft(memory_budget=0)
    with pytest.raises(ValueError, match="batch=False"):
        pk.patch_peft(device="cpu", batch=False)
    with pytest.raises(RuntimeError):
        pk.patch_peft(device="no such device")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device='cuda' cannot be used: "):
            pk.patch_peft(device="cuda")
