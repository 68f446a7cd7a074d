"""Whole models on a GPU and streamed through it: accuracy, devices, memory, pinned copies."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.peft.layers import batches
from pissa_kernels.peft.weights import record
from pissa_kernels.runtime import transfer
from pissa_kernels.runtime.transfer import HostCopy, PinnedTransfer
from pissa_kernels.svd import cost

from ..support.adapted import assert_same, config, lora_layers, moved, state
from ..support.models import build, output
from ..support.reference import ROUNDOFF, energy_deficit

pytestmark = pytest.mark.gpu


def check(base: Any, adapted: Any) -> None:
    """Every layer against its weight, in float64 on the CPU."""
    for name, layer in lora_layers(adapted).items():
        W = base.get_submodule(name).weight.detach().cpu().double()
        weight = layer.get_base_layer().weight
        tensors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, weight)
        A, B, residual = (tensor.detach().cpu().double() for tensor in tensors)
        u = ROUNDOFF[weight.dtype]
        assert energy_deficit(W, A) <= 1e-6 + u**2
        assert (W - residual - layer.scaling["default"] * B @ A).norm() <= (u + 2e-7) * W.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_every_layer(way: str, dtype: torch.dtype) -> None:
    base = build("llama", dtype, width=256, layers=4)
    model = copy.deepcopy(base).to("cuda" if way == "resident" else "cpu")
    with pk.patch_peft(device=None if way == "resident" else "cuda") as report:
        adapted = peft.get_peft_model(model, config("llama", r=8))
    assert len(report.layers) == 28
    assert {p.device.type for p in adapted.parameters()} == {"cuda" if way == "resident" else "cpu"}
    check(base, adapted)


def test_a_model_on_two_devices() -> None:
    base = build("llama", torch.bfloat16, width=256)
    model = copy.deepcopy(base)
    model.model.layers[1].to("cuda")
    with pk.patch_peft():
        check(base, peft.get_peft_model(model, config("llama", r=8)))


def test_a_small_budget_gives_more_batches_and_accurate_factors() -> None:
    base = build("llama", torch.bfloat16, width=256, layers=4)
    weight_bytes = 256 * 768 * 2
    with pk.patch_peft(memory_budget=64 << 20) as report:
        adapted = peft.get_peft_model(copy.deepcopy(base).to("cuda"), config("llama", r=8))
    check(base, adapted)
    assert report.peak_extra_bytes is not None
    assert report.peak_extra_bytes > weight_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_a_model_has_the_same_bits_in_one_batch_and_in_many(
    way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build("llama", dtype, width=256, layers=4)
    sizes: list[int] = []
    real = batches.principal_factors_of_batch
    monkeypatch.setattr(
        batches, "principal_factors_of_batch", lambda views, recipes: sizes.append(len(views)) or real(views, recipes)
    )
    largest = 256 * 768
    tight = cost.workspace(768, 256, 8, None, machine="cuda")
    if way == "streamed":
        tight += batches.IN_FLIGHT * largest * dtype.itemsize
    found = []
    for budget in (4 << 30, tight):
        model = copy.deepcopy(base).to("cuda" if way == "resident" else "cpu")
        with pk.patch_peft(device=None if way == "resident" else "cuda", memory_budget=budget):
            found.append(state(peft.get_peft_model(model, config("llama", r=8))))
    # query and output, key and value, gate and up, and down have one shape each
    assert sizes[:4] == [8, 8, 8, 4]
    assert sizes[4:].count(1) >= 12  # those of the largest shape, at least
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_the_caller_is_still_computing_on_its_own_stream(dtype: torch.dtype) -> None:
    base = build("llama", dtype, width=256)
    model = copy.deepcopy(base).to("cuda")
    targets = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    values = [weight.detach().clone() for weight in targets]
    for weight in targets:
        weight.data.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        torch.cuda._sleep(1 << 29)
        for weight, value in zip(targets, values, strict=True):
            weight.data.copy_(value)
        with pk.patch_peft():
            adapted = peft.get_peft_model(model, config("llama", r=8))
        check(base, adapted)  # on the same stream


def test_layers_streamed_from_a_stream_of_the_caller() -> None:
    base = build("llama", torch.bfloat16, width=256)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream), pk.patch_peft(device="cuda"):
        torch.cuda._sleep(1 << 29)
        check(base, peft.get_peft_model(copy.deepcopy(base), config("llama", r=8)))


def test_elements_of_a_fingerprint_are_the_same_on_a_gpu_and_taken_without_waiting() -> None:
    for shape in ((300, 200), (3, 5)):
        weights = [torch.randn(shape).bfloat16(), torch.randn(shape[::-1]).bfloat16().mT]
        for weight in weights:
            assert torch.equal(record.fingerprint(weight), record.fingerprint(weight.cuda()))
        on_gpu = [weight.cuda() for weight in weights]
        found = torch.empty(2, min(64, weights[0].numel()), dtype=torch.bfloat16, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            record.sample_(found, on_gpu, record.places_on(on_gpu[0]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(
            torch.equal(row.float(), record.fingerprint(each)) for row, each in zip(found.cpu(), weights, strict=True)
        )


@pytest.mark.parametrize("size", [1 << 10, 1 << 20])
def test_a_host_copy_has_the_values_of_its_moment(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BUFFER_BYTES", size)
    source = torch.randn(700, 30, device="cuda")
    expected = (source * 2).cpu()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        torch.cuda._sleep(1 << 28)
        doubled = source * 2
        copied = HostCopy([doubled, doubled.mT[:5], doubled[:0]])
        torch.cuda._sleep(1 << 28)
        found = copied.result()
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected.mT[:5])
    assert found[2].shape == (0, 30)


def test_an_adapter_from_the_cpu_loads_onto_a_gpu(tmp_path: Any) -> None:
    base = build("llama", torch.bfloat16, width=256)
    with pk.patch_peft():
        adapted = peft.get_peft_model(copy.deepcopy(base), config("llama", r=8)).eval()
    adapted.save_pretrained(tmp_path)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base).to("cuda"), tmp_path).eval()
    for name, layer in lora_layers(adapted).items():
        other = lora_layers(loaded)[name].get_base_layer().weight.cpu()
        # the same A and B in float32, summed in another order: a few elements differ in the last bit
        assert moved(layer.get_base_layer().weight.double(), other.double()) <= ROUNDOFF[torch.bfloat16]
    with pk.original_model(adapted):
        assert moved(output(base), output(adapted)) <= 0.05


def test_pinned_copies_to_the_gpu_and_back() -> None:
    weights = [torch.randn(64, 48).bfloat16() for _ in range(7)]
    transfer = PinnedTransfer(torch.device("cuda"))
    stack = transfer.to_device(weights)
    assert stack.is_cuda
    copies = [tensor.clone() for tensor in transfer.to_host(stack)]
    assert all(torch.equal(one, other) for one, other in zip(weights, copies, strict=True))
    # then tensors of another shape
    other = [torch.randn(3, 5) for _ in range(2)]
    assert all(
        torch.equal(a, b.clone()) for a, b in zip(other, transfer.to_host(transfer.to_device(other)), strict=True)
    )
