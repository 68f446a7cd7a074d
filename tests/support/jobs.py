"""Layers to be initialized, as the schedule gets them, and what each must be afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

from pissa_kernels.peft.layers import batches
from pissa_kernels.peft.layers.initialize import prepare
from pissa_kernels.peft.layers.layer import LayerJob

from .adapted import lora_layers
from .reference import ROUNDOFF, energy_deficit, realistic

CPU = torch.device("cpu")
NAMES = [str(index) for index in range(8)]


class Net(nn.Module):
    """Eight layers of one shape: at a failure some are finished, some are running and some have not been started."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 48, bias=False) for _ in range(8))
        for index, layer in enumerate(self.layers):
            layer.weight.data = realistic(48, 48, seed=index).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def inject(net: nn.Module) -> Any:
    return peft.get_peft_model(net, peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=NAMES))


def on_call(number: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, except that its ``number``-th call raises ``error``."""
    calls = iter(range(1, 1000))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return function(*args, **kwargs)

    return wrapper


def jobs_of(net: nn.Module, rank: int = 4, init: str = "pissa") -> list[LayerJob]:
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    settings = {"r": rank, "init_lora_weights": True, "target_modules": names}
    model = peft.get_peft_model(net, peft.LoraConfig(**settings))
    jobs = [prepare(layer, "default", init, name=name) for name, layer in lora_layers(model).items()]
    return [job for job in jobs if job is not None]


def assert_accurate(jobs: list[LayerJob], weights: dict[str, torch.Tensor]) -> None:
    for job in jobs:
        stored = weights[job.name or ""].double()
        W = stored.mT if job.transposed else stored
        A, B = (factor["default"].weight.detach() for factor in (job.layer.lora_A, job.layer.lora_B))
        u = ROUNDOFF[job.weight.dtype]
        assert energy_deficit(W, A) <= 1e-6 + u**2  # the elements of A are rounded to u
        error = (W - job.layout.matrices(job.weight)[0].double() - job.recipe.scaling * B.double() @ A.double()).norm()
        assert error <= (u + 2e-7) * W.norm()


def mixed_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    shapes = [(64, 48), (48, 64), (64, 48), (48, 48), (64, 48), (48, 64)]
    net = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes))
    for index, layer in enumerate(net):
        layer.weight.data = realistic(*layer.weight.shape, seed=index).to(dtype)  # type: ignore[arg-type, union-attr]
    return net


def run(planned: list[list[LayerJob]], way: str, emit: batches.Emit = lambda job, report: None) -> None:
    if way == "streamed":
        batches._streamed(planned, CPU, emit, threading.Event())
    else:
        batches.run_batches(planned, CPU, emit, threading.Event())
