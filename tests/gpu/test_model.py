"""Whole models on a GPU and streamed through it: accuracy, devices, memory, pinned copies."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.runtime.transfer import PinnedTransfer

from ..peft.test_models import config, lora_layers, moved
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
