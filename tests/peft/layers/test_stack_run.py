"""Layers of several matrices on several threads: none is left half written, whatever fails beside them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import pissa_kernels as pk
from pissa_kernels.peft.layers import layer as layer_module
from pissa_kernels.peft.layers import writing

from ...support.reference import energy_deficit, realistic

EXPERTS, SHAPE = 6, (48, 40)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.stack([realistic(*SHAPE, seed=index) for index in range(EXPERTS)]).float())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.stack.mT).sum(0)


class Net(nn.Module):
    """The stack is the larger one, so that it is started first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.linear = Experts(), nn.Linear(40, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x) + self.linear(x)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def inject(net: nn.Module, **changes: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa", "target_modules": ["linear"]}
    return peft.get_peft_model(net, peft.LoraConfig(**(settings | {"target_parameters": ["experts.stack"]} | changes)))


def assert_complete(wrapper: Any, original: Tensor) -> None:
    """Every expert is W_res + s·B·A, with the energy of an exact SVD."""
    A, B = wrapper.lora_A["default"].weight.detach().double(), wrapper.lora_B["default"].weight.detach().double()
    residual = wrapper.get_base_layer().stack.detach().double()
    for index, W in enumerate(original.double()):
        rows, columns = A[4 * index : 4 * index + 4], B[:, index::EXPERTS]
        assert float((residual[index] + columns @ rows - W).norm() / W.norm()) <= 1e-6
        assert energy_deficit(W, rows) <= 1e-6


def test_a_failure_beside_a_stack_that_is_written(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer beside it fails after the first expert is a residual and before the last is one."""
    writes, failed = threading.Event(), threading.Event()
    subtract, run = writing.LayerWriter.subtract, layer_module.LayerJob.run

    def waits(job: Any, factors: Any, first: int = 0) -> None:
        subtract(job, factors, first)
        writes.set()
        assert failed.wait(30)

    def fails(job: Any, *args: Any) -> Any:
        assert writes.wait(30)
        failed.set()
        raise RuntimeError("no more")

    monkeypatch.setattr(writing.LayerWriter, "subtract", waits)
    monkeypatch.setattr(layer_module.LayerJob, "run", fails)
    net = Net()
    original = net.experts.stack.detach().clone()
    with pytest.raises(RuntimeError, match="no more"), pk.patch_peft() as report:
        inject(net)
    assert [layer.name for layer in report.layers] == ["experts.stack"]
    assert len(report.layers[0].parts) == EXPERTS
    monkeypatch.setattr(writing.LayerWriter, "subtract", subtract)
    monkeypatch.setattr(layer_module.LayerJob, "run", run)
    assert_complete(net.experts, original)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    with pk.patch_peft() as again:  # a second call does the rest
        model = inject(net)
    assert {layer.name for layer in again.layers} == {"experts.stack", "linear"}
    expected = copy.deepcopy(Net())
    expected.load_state_dict({**Net().state_dict(), "experts.stack": original}, strict=False)
    expected.linear.load_state_dict(
        {"weight": net.linear.base_layer.weight + _product(net.linear), "bias": net.linear.bias}
    )
    assert torch.allclose(model(x), expected(x), atol=1e-5)


def _product(layer: Any) -> Tensor:
    delta: Tensor = layer.get_delta_weight("default")
    return delta


def test_a_refused_expert_leaves_all_unchanged(two_threads: None) -> None:
    net = Net()
    net.experts.stack.data[3, 0, 0] = float("nan")
    before = copy.deepcopy(net.state_dict())
    words = r"layer 'experts\.stack\[3\]', weight \(48, 40\)"
    with pytest.raises(ValueError, match=words), pk.patch_peft() as report:
        inject(net, target_modules=[])
    assert report.layers == []
    stack = net.experts.get_base_layer().stack if hasattr(net.experts, "get_base_layer") else net.experts.stack
    assert torch.equal(stack.nan_to_num(), before["experts.stack"].nan_to_num())


@pytest.mark.parametrize("batch", [True, False])
def test_a_write_that_fails_in_the_middle_is_undone(
    batch: bool, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together with the other layers, by several threads, and alone."""
    calls, subtract = [], writing.ops.subtract_lowrank_

    def fails_once(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("no memory")
        return subtract(*args)

    monkeypatch.setattr(writing.ops, "subtract_lowrank_", fails_once)
    net = Net()
    original = net.experts.stack.detach().clone()
    with pytest.raises(RuntimeError, match=r"layer 'experts\.stack'.*no memory"), pk.patch_peft(batch=batch) as report:
        inject(net, target_modules=[])
    assert report.layers == []
    assert len(calls) > 4
    stack = net.experts.get_base_layer().stack if hasattr(net.experts, "get_base_layer") else net.experts.stack
    assert float((stack - original).norm() / original.norm()) <= 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_a_convolution_in_another_memory_format(seed: int, two_threads: None) -> None:
    """Its matrices are no views of the weight, and a thread that writes one back would undo another's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(64, 64, 3, groups=16)).to(memory_format=torch.channels_last)
    original = net[0].weight.detach().double()
    with pk.patch_peft():
        model = peft.get_peft_model(
            net, peft.LoraConfig(r=32, lora_alpha=32, init_lora_weights="pissa", target_modules=["0"])
        )
    layer = model.base_model.model[0]
    A, B = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
    for group in range(16):
        rows = A[2 * group : 2 * group + 2, 4 * group : 4 * group + 4].flatten(1)
        W, W_res = (each[4 * group : 4 * group + 4].flatten(1) for each in (original, layer.base_layer.weight.double()))
        assert float((W_res + B[4 * group : 4 * group + 4].flatten(1) @ rows - W).norm() / W.norm()) <= 1e-6
