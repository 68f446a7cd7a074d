"""``pissa_init`` on one layer: its contract, and refusals that write nothing."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

import pissa_kernels as pk
from pissa_kernels.peft.layers import layer as layer_module
from pissa_kernels.peft.layers import writing

from ...support.reference import realistic


def lora_layer(
    base: nn.Module | None = None, rank: int = 4, dtype: torch.dtype = torch.float32, **changes: Any
) -> Linear:
    """PEFT's own LoRA layer around a linear layer, before PiSSA."""
    if base is None:
        base = nn.Linear(24, 40, bias=False)
        base.weight.data = realistic(40, 24).to(dtype)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, fan_in_fan_out=isinstance(base, Conv1D), **changes)
    conv = isinstance(base, Conv1D)
    return Linear(
        base,
        "default",
        config=config,
        r=rank,
        lora_alpha=2 * rank,
        fan_in_fan_out=conv,
        is_target_conv_1d_layer=conv,
    )


def snapshot(layer: Linear) -> list[torch.Tensor]:
    tensors = (layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return [tensor.detach().clone() for tensor in tensors]


def assert_untouched(layer: Linear, before: list[torch.Tensor]) -> None:
    for now, then in zip(snapshot(layer), before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv", [False, True])
def test_the_contract(dtype: torch.dtype, conv: bool) -> None:
    base: nn.Module = Conv1D(40, 24) if conv else nn.Linear(24, 40)
    W = realistic(40, 24).to(dtype)
    base.weight.data = W.mT.contiguous() if conv else W.clone()
    layer = lora_layer(base)
    parameter, address = base.weight, base.weight.data_ptr()
    assert pk.pissa_init(layer, "default", "pissa") is None
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (A.shape, B.shape) == ((4, 24), (40, 4))
    assert A.dtype == B.dtype == torch.float32
    assert A.is_contiguous()
    assert B.is_contiguous()
    assert isinstance(A, nn.Parameter)
    assert A.requires_grad
    assert base.weight is parameter
    assert base.weight.data_ptr() == address
    assert base.weight.dtype == dtype
    assert base.weight.is_contiguous()
    residual = base.weight.detach().double().mT if conv else base.weight.detach().double()
    error = W.double() - residual - 2.0 * B.detach().double() @ A.detach().double()
    assert error.norm() <= torch.finfo(dtype).eps * residual.norm()
    exact = torch.linalg.svdvals(W.double())
    assert (torch.linalg.svdvals(residual)[0] - exact[4]).abs() <= 3 * torch.finfo(dtype).eps * exact[0]


def test_the_signature_is_pefts() -> None:
    import inspect

    ours = inspect.signature(pk.pissa_init)
    assert list(ours.parameters) == ["self", "adapter_name", "init_lora_weights"]
    assert list(inspect.signature(peft.tuners.lora.layer.LoraLayer.pissa_init).parameters) == list(ours.parameters)


class Params4bit(nn.Parameter):
    """Has the name of bitsandbytes' parameter, and a float storage dtype."""


class WithQuantState(nn.Parameter):
    quant_state = object()


class Subclass(torch.Tensor):
    """A tensor subclass whose dtype is not that of its storage, like those of torchao."""


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.ones(40, 24, dtype=torch.float64), r"torch\.float64.*\(40, 24\)"),
        (torch.ones(40, 24).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.ones(480, 1, dtype=torch.uint8), r"torch\.uint8"),
        (Params4bit(torch.ones(480, 1).bfloat16(), requires_grad=False), "bitsandbytes Params4bit"),
        (WithQuantState(torch.ones(40, 24), requires_grad=False), "bitsandbytes WithQuantState"),
        (torch.ones(40, 24).as_subclass(Subclass), "tensor subclass .*Subclass"),
    ],
)
def test_quantized_and_other_dtypes_are_refused(weight: torch.Tensor, words: str) -> None:
    layer = lora_layer()
    base = layer.get_base_layer()
    del base.weight
    object.__setattr__(base, "weight", weight)
    before = [t.detach().clone() for t in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
    with pytest.raises(TypeError, match=rf"^Please initialize PiSSA under float32, float16, or bfloat16\. .*{words}"):
        pk.pissa_init(layer, "default", "pissa")
    assert torch.equal(before[0], layer.lora_A["default"].weight)
    assert torch.equal(before[1], layer.lora_B["default"].weight)


def spoil(layer: Linear, what: str) -> None:
    weight = layer.get_base_layer().weight
    if what == "nan":
        weight.data[3, 4] = math.nan
    elif what == "inf":
        weight.data[3, 4] = -math.inf
    elif what == "rank":
        layer.r["default"] = 25
    elif what == "scaling":
        layer.scaling["default"] = 0.0
    elif what == "orientation":
        layer.fan_in_fan_out = True
    elif what == "expanded":
        weight.data = weight.data[:, :1].expand(40, 24)
    elif what == "3-D":
        weight.data = weight.data.reshape(4, 10, 24)
    elif what == "parametrized":
        nn.utils.parametrizations.weight_norm(layer.get_base_layer())


@pytest.mark.parametrize(
    ("what", "init", "words"),
    [
        ("nan", "pissa", r"^a Linear layer, weight \(40, 24\): the weight holds NaN"),
        ("inf", "pissa_niter_4", r"^a Linear layer, weight \(40, 24\): the weight holds Inf"),
        ("rank", "pissa", r"^a Linear layer.*: the weight has shape \(40, 24\).*1 ≤ r ≤ 24, got r=25"),
        ("scaling", "pissa", "^a Linear layer.*scaling.*above 0, got 0.0"),
        (
            "orientation",
            "pissa",
            r"weight \(40, 24\): with fan_in_fan_out=True the weight takes A \(4, 40\) and B \(24, 4\)",
        ),
        ("expanded", "pissa", "^a Linear layer.*share memory"),
        ("3-D", "pissa", r"^a Linear layer.*: the weight must be 2-D, got shape \(4, 10, 24\)"),
        ("parametrized", "pissa", "^a ParametrizedLinear layer.*computed from other parameters \\(a parametrization"),
        ("", "pissa_16", "init_lora_weights should be 'pissa' or"),
        ("", "pissa_niter_1.5", "an integer N ≥ 0"),
    ],
)
def test_a_refusal_leaves_the_layer_unchanged(what: str, init: str, words: str) -> None:
    layer = lora_layer()
    spoil(layer, what)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=words):
        pk.pissa_init(layer, "default", init)
    assert_untouched(layer, before)


def test_an_empty_weight_is_refused() -> None:
    layer = lora_layer()
    layer.get_base_layer().weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"ZeRO-3.*gathered"):
        pk.pissa_init(layer, "default", "pissa")


@pytest.mark.parametrize("where", ["factors", "subtraction"])
def test_a_failure_leaves_the_layer_unchanged(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = lora_layer()
    before = snapshot(layer)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    if where == "factors":
        monkeypatch.setattr(layer_module, "principal_factors", fail)
    else:
        monkeypatch.setattr(writing.ops, "subtract_lowrank_", fail)
    with pytest.raises(MemoryError, match=r"^a Linear layer, weight \(40, 24\): no room"):
        pk.pissa_init(layer, "default", "pissa")
    assert_untouched(layer, before)


def test_a_meta_weight_is_left_alone_with_a_warning() -> None:
    with torch.device("meta"):
        layer = lora_layer(nn.Linear(24, 40))
    with pytest.warns(UserWarning, match=r"^a Linear layer, weight \(40, 24\): .* on the meta device"):
        pk.pissa_init(layer, "default", "pissa")
    assert layer.get_base_layer().weight.is_meta


def test_a_meta_adapter_leaves_the_weight_unchanged_with_a_warning() -> None:
    layer = lora_layer()
    layer.lora_A["default"].to("meta")
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.to("meta"))
    before = layer.get_base_layer().weight.detach().clone()
    with pytest.warns(UserWarning, match="low_cpu_mem_usage"):
        pk.pissa_init(layer, "default", "pissa")
    assert torch.equal(before, layer.get_base_layer().weight)


def test_a_model_loaded_under_inference_mode() -> None:
    with torch.inference_mode():
        base = nn.Linear(24, 40, bias=False)
        base.weight.data.copy_(realistic(40, 24))
    W = base.weight.detach().double()
    layer = lora_layer(base)
    pk.pissa_init(layer, "default", "pissa")
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    assert (W - base.weight.double() - 2 * B @ A).norm() <= 1e-6 * W.norm()
