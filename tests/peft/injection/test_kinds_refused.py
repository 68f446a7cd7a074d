"""Layers that a residual cannot be right for: refused by name in one line, and the model is what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

import pissa_kernels as pk

from ...support.architectures import ARCHITECTURES
from ...support.kinds import Stack, build, lora_config
from ...support.kinds_operations import allowed, exact_output, off, output, patched


class Model(nn.Module):
    """A model with a layer to adapt, and one before it that is adapted already when the refusal comes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.layer = layer


def strided(layer: Any) -> Any:
    layer.weight = nn.Parameter(layer.weight.detach()[:, :1].expand(*layer.weight.shape))
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dilation": (lambda: nn.Conv2d(8, 16, 3, dilation=2, padding=2), "dilation"),
    "dilation in one direction": (lambda: nn.Conv2d(8, 16, 3, dilation=(1, 2)), "dilation"),
    "dilation of Conv1d": (lambda: nn.Conv1d(8, 16, 3, dilation=3), "dilation"),
    "dilation of Conv3d": (lambda: nn.Conv3d(4, 8, 2, dilation=2), "dilation"),
    "circular padding": (lambda: nn.Conv1d(8, 16, 3, padding=1, padding_mode="circular"), "padding_mode"),
    "reflected padding": (lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), "padding_mode"),
    "max_norm": (lambda: nn.Embedding(40, 16, max_norm=1.0), "max_norm"),
    "positions": (lambda: BartLearnedPositionalEmbedding(40, 16), "BartLearnedPositionalEmbedding"),  # type: ignore[no-untyped-call]
    "overlapping kernel": (lambda: strided(nn.Conv2d(8, 16, 3)), "share memory"),
    "overlapping table": (lambda: strided(nn.Embedding(40, 16)), "share memory"),
}


def remembered(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[tuple[str, type]]]:
    return (
        {key: value.detach().clone() for key, value in model.state_dict().items()},
        [(name, type(module)) for name, module in model.named_modules()],
    )


def assert_as_before(before: tuple[dict[str, torch.Tensor], list[tuple[str, type]]], model: nn.Module) -> None:
    state, modules = before
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in after.items())


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_pefts_adapter_does_not_compute_like(kind: str) -> None:
    make, word = LAYERS[kind]
    model = Model(make())
    before = remembered(model)
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match=rf"^layer 'layer'.*{word}") as error, pk.patch_peft():
        peft.get_peft_model(model, config)
    one_line(error)
    assert_as_before(before, model)


@pytest.mark.parametrize("kind", LAYERS)
def test_such_a_layer_beside_one_that_is_adapted(kind: str) -> None:
    """By ``add_adapter`` all of the call is undone, by ``get_peft_model`` nothing of the refused layer is changed."""
    make, word = LAYERS[kind]
    model = Model(make())
    state = copy.deepcopy(model.layer.state_dict())
    with pk.patch_peft():
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["first"], init_lora_weights="pissa"))
    before = remembered(adapted)
    config = peft.LoraConfig(r=2, target_modules=["first", "layer"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match=rf"^layer 'layer'.*{word}"), pk.patch_peft():
        adapted.add_adapter("second", config)
    assert_as_before(before, adapted)
    assert list(adapted.peft_config) == ["default"]
    assert all(torch.equal(value, state[key]) for key, value in model.layer.state_dict().items())


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_tied_embeddings(target: str) -> None:
    model = ARCHITECTURES["gpt2"].build()
    before = remembered(model)
    config = peft.LoraConfig(r=4, target_modules=[target], init_lora_weights="pissa")
    with pytest.raises(ValueError, match=rf"^layer '(transformer\.)?{target}'.*is tied to .*Untie") as error:  # noqa: SIM117
        with pk.patch_peft():
            peft.get_peft_model(model, config)
    one_line(error)
    assert torch.equal(model.transformer.wte.state_dict().popitem()[1], before[0]["transformer.wte.weight"])


def test_untied_embeddings_as_the_message_says() -> None:
    model = ARCHITECTURES["gpt2"].build()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        exact = copy.deepcopy(model).double()(input_ids=ids).logits
    config = peft.LoraConfig(r=4, target_modules=["wte", "lm_head"], init_lora_weights="pissa")
    with pk.patch_peft() as report:
        adapted = peft.get_peft_model(model, config).eval()
    assert {layer.name for layer in report.layers} == {"transformer.wte", "lm_head"}
    with torch.no_grad():
        assert off(exact, adapted(input_ids=ids).logits) <= 2 * off(exact, expected) + 1e-7


@pytest.mark.parametrize("sizes", [{"kdim": 24}, {"vdim": 24}, {"kdim": 24, "vdim": 20}])
def test_attention_with_keys_or_values_of_another_size(sizes: dict[str, int]) -> None:
    model = Model(nn.MultiheadAttention(32, 4, **sizes))
    before = remembered(model)
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"^layer 'layer': MultiheadAttention"), pk.patch_peft():
        peft.get_peft_model(model, config)
    assert_as_before(before, model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", ["stack", "stack, transposed"])
def test_a_value_that_is_not_finite_in_one_expert(name: str, parameter: str, value: float) -> None:
    base = build(name)
    getattr(base.layer, parameter).data[3, 5, 7] = value
    before = {key: each.clone() for key, each in base.layer.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^layer 'layer\.{parameter}.*\b3\b.*(NaN|Inf)") as error, pk.patch_peft():
        peft.get_peft_model(base, lora_config(name))
    one_line(error)
    inner = base.layer.get_base_layer() if hasattr(base.layer, "get_base_layer") else base.layer
    assert torch.equal(getattr(inner, parameter).nan_to_num(), before[parameter].nan_to_num())


@pytest.mark.parametrize("name", ["Embedding", "Conv2d 3x3", "Conv2d, 2 groups", "MultiheadAttention", "parameter"])
def test_a_value_that_is_not_finite(name: str) -> None:
    base = build(name)
    weight = next(parameter for parameter in base.parameters() if parameter.ndim >= 2)
    weight.data.view(-1)[3] = torch.nan
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"^layer 'layer.*NaN") as error, pk.patch_peft():
        peft.get_peft_model(base, lora_config(name))
    one_line(error)
    assert torch.equal(weight.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_stack_of_another_dtype(dtype: torch.dtype, is_transposed: bool) -> None:
    layer = Stack(3, 24, 32, is_transposed)
    for name, parameter in list(layer.named_parameters()):
        codes = torch.randint(0, 100, parameter.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        setattr(layer, name, nn.Parameter(codes, requires_grad=False))
    model = Model(layer)
    before = {name: parameter.data.view(torch.uint8).clone() for name, parameter in layer.named_parameters()}
    types = [type(module) for module in model.modules()]
    config = peft.LoraConfig(r=2, target_parameters=["layer.down_proj"], init_lora_weights="pissa")
    message = r"^Please initialize PiSSA under float32, float16, or bfloat16\. layer 'layer\.down_proj'"
    with pytest.raises(TypeError, match=message) as error, pk.patch_peft():
        peft.get_peft_model(model, config)
    one_line(error)
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(each.data.view(torch.uint8), before[name]) for name, each in layer.named_parameters())


def test_a_sharded_convolution_with_groups() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = nn.Conv2d(8, 16, 3, groups=2)
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]))
        before = layer.weight.to_local().clone()
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
        model = nn.Sequential(layer)
        with (
            pytest.raises(ValueError, match=r"^layer '0', weight .*convolution with 2 groups is sharded as") as error,
            pk.patch_peft(),
        ):
            peft.get_peft_model(model, config)
        one_line(error)
        assert type(model[0]) is nn.Conv2d
        assert torch.equal(layer.weight.to_local(), before)
    finally:
        dist.destroy_process_group()


def test_a_stack_with_weights_that_the_experts_share() -> None:
    layer = Stack(4, 24, 32, False)
    layer.down_proj = nn.Parameter(torch.randn(1, 24, 32).expand(4, -1, -1))
    model = Model(layer)
    before = layer.down_proj.detach().clone()
    config = peft.LoraConfig(r=2, target_parameters=["layer.down_proj"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"^layer 'layer\.down_proj'.*share memory"), pk.patch_peft():
        peft.get_peft_model(model, config)
    assert torch.equal(layer.down_proj, before)


def test_parameters_of_another_dimension() -> None:
    """PEFT's own error."""
    model = Model(nn.Linear(12, 16))
    before = remembered(model)
    config = peft.LoraConfig(r=2, target_parameters=["layer.bias"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="1 dimensional"), pk.patch_peft():
        peft.get_peft_model(model, config)
    assert_as_before(before, model)


@pytest.mark.parametrize("name", ["Embedding", "Conv2d 3x3", "Conv2d, depthwise", "MultiheadAttention", "stack"])
def test_a_model_without_values_is_left_alone(name: str) -> None:
    base = build(name).to("meta")
    with pytest.warns(UserWarning, match="meta device"), pk.patch_peft() as report:
        peft.get_peft_model(base, lora_config(name))
    assert report.layers == []


@pytest.mark.parametrize("name", ["Conv2d, 2 groups", "Conv2d, depthwise"])
def test_a_rank_that_the_groups_cannot_share(name: str) -> None:
    """PEFT's own error, for the first adapter and for one beside it."""
    base = build(name)
    before = remembered(base)
    with pytest.raises(ValueError, match="rank is divisible by groups"), pk.patch_peft():
        peft.get_peft_model(base, lora_config(name, r=5))
    assert_as_before(before, base)


@pytest.mark.parametrize("name", ["Conv2d, 2 groups", "Conv2d, depthwise"])
def test_a_second_adapter_whose_rank_the_groups_cannot_share(name: str) -> None:
    """PEFT checks the rank of the first adapter only, and then cannot make B."""
    base = build(name)
    model, _ = patched(name, base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="groups"), pk.patch_peft():
        model.add_adapter("second", lora_config(name, r=5))
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
