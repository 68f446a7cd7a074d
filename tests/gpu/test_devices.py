"""Models that are streamed through several GPUs, and through two pipelines on one: bits, places, failures."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.peft import patch

from ..support.adapted import assert_same, config, lora_layers, state
from ..support.models import build
from .test_model import check

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
two_gpus = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two CUDA devices; torch sees one"
)


@pytest.fixture
def two_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current GPU under two names, which are refused otherwise: two threads, each with streams and buffers."""
    both = (torch.device("cuda"), torch.device("cuda", torch.cuda.current_device()))
    monkeypatch.setattr(patch, "devices_of", lambda named: both)


def streamed(base: Any, device: Any, **settings: Any) -> tuple[dict[str, tuple[torch.Tensor, ...]], list[str | None]]:
    """Residual, A and B of every layer, and the names of the report."""
    with pk.patch_peft(device=device, **settings) as report:
        adapted = peft.get_peft_model(copy.deepcopy(base), config("llama", r=8))
    check(base, adapted)
    return state(adapted), [layer.name for layer in report.layers]


def assert_equal(left: Any, right: Any) -> None:
    assert_same(left[0], right[0])
    assert left[1] == right[1]


@DTYPES
def test_one_gpu_in_a_list(dtype: torch.dtype) -> None:
    base = build("llama", dtype, width=256, layers=4)
    assert_equal(streamed(base, ["cuda"]), streamed(base, "cuda"))


@DTYPES
@pytest.mark.parametrize("budget", [None, 80 << 20])
def test_two_pipelines_on_one_gpu_have_the_bits_of_one(
    dtype: torch.dtype, budget: int | None, request: pytest.FixtureRequest
) -> None:
    base = build("llama", dtype, width=256, layers=4)
    one = streamed(base, "cuda", memory_budget=budget)
    request.getfixturevalue("two_pipelines")
    assert_equal(streamed(base, "cuda", memory_budget=budget), one)


@pytest.mark.usefixtures("two_pipelines")
def test_layers_on_a_gpu_beside_streamed_ones_in_two_pipelines() -> None:
    base = build("llama", torch.bfloat16, width=256, layers=4)
    model = copy.deepcopy(base)
    model.model.layers[1].to("cuda")
    with pk.patch_peft(device="cuda"):
        adapted = peft.get_peft_model(model, config("llama", r=8))
    check(base, adapted)
    for name, layer in lora_layers(adapted).items():
        assert layer.get_base_layer().weight.is_cuda == name.startswith("model.layers.1."), name


@pytest.mark.usefixtures("two_pipelines")
def test_a_refused_weight_stops_two_pipelines() -> None:
    base = build("llama", torch.bfloat16, width=256, layers=4)
    model = copy.deepcopy(base)
    name = "model.layers.2.mlp.up_proj"
    model.get_submodule(name).weight.data[1, 2] = torch.nan
    with pk.patch_peft(device="cuda", memory_budget=1 << 30) as report:
        with pytest.raises(ValueError, match=rf"^layer '{name}', .* NaN"):
            peft.get_peft_model(model, config("llama", r=8))
        done = {layer.name for layer in report.layers}
    assert name not in done
    for each, layer in lora_layers(model).items():
        if each not in done and each != name:
            assert torch.equal(layer.get_base_layer().weight, base.get_submodule(each).weight)


def test_devices_that_are_refused() -> None:
    current = torch.cuda.current_device()
    with pytest.raises(ValueError, match=rf"names cuda:{current} twice; name each device once$"):
        pk.patch_peft(device=["cuda", f"cuda:{current}"])
    with pytest.raises(ValueError, match="mixes kinds of devices"):
        pk.patch_peft(device=["cuda", "cpu"])
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(RuntimeError, match=rf"^device='{missing}' cannot be used: .*") as refused:
        pk.patch_peft(device=["cuda", missing])
    assert "\n" not in str(refused.value)


@two_gpus
@DTYPES
@pytest.mark.parametrize("budget", [None, 80 << 20])
def test_two_gpus_have_the_bits_of_one(dtype: torch.dtype, budget: int | None) -> None:
    base = build("llama", dtype, width=256, layers=4)
    one = streamed(base, "cuda:0", memory_budget=budget)
    torch.cuda.reset_peak_memory_stats(1)
    before = torch.cuda.memory_allocated(1)
    two = streamed(base, ["cuda:0", "cuda:1"], memory_budget=budget)
    assert torch.cuda.max_memory_allocated(1) > before
    assert_equal(two, one)
    assert_equal(streamed(base, ["cuda:1"], memory_budget=budget), one)


@two_gpus
def test_layers_on_two_gpus_beside_streamed_ones() -> None:
    base = build("llama", torch.bfloat16, width=256, layers=4)
    model = copy.deepcopy(base)
    model.model.layers[1].to("cuda:0")
    model.model.layers[2].to("cuda:1")
    with pk.patch_peft(device=["cuda:0", "cuda:1"]):
        adapted = peft.get_peft_model(model, config("llama", r=8))
    check(base, adapted)
    places = {1: "cuda:0", 2: "cuda:1"}
    for name, layer in lora_layers(adapted).items():
        assert str(layer.get_base_layer().weight.device) == places.get(int(name.split(".")[2]), "cpu"), name
