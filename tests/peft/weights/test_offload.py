"""Weights that are not where they seem: offloaded by accelerate, sharded, flattened, fake, or on the meta device."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader
from torch import nn

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers
from pissa_kernels.peft.weights.offload import resident, values_of

from ...support.models import TARGETS, build, linear_weights, output
from ...support.reference import ROUNDOFF, energy_deficit


def config(**changes: Any) -> peft.LoraConfig:
    settings = {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa", "target_modules": TARGETS["llama"]}
    return peft.LoraConfig(**(settings | changes))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def cpu_offload(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def cpu_offload_in_a_sequence(model: Any) -> None:
    cpu_offload(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, ModelHook(), append=True)
            assert isinstance(module._hf_hook, SequentialHook)


def offload_to_a_loader(model: Any) -> None:
    """As ``dispatch_model`` does it with a device map that has "disk" in it, too."""
    values = OffloadedWeightsLoader(state_dict={name: value.detach() for name, value in model.state_dict().items()})
    attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=values)


def offload_one_by_one(model: Any) -> None:
    """Every hook keeps a dictionary of its own."""
    attach_align_device_hook(model, execution_device="cpu", offload=True)


OFFLOADS = [cpu_offload, cpu_offload_in_a_sequence, offload_to_a_loader, offload_one_by_one]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_every_offloaded_layer_is_initialized(offload: Any, dtype: torch.dtype) -> None:
    base = build("llama", dtype)
    original = copy.deepcopy(base)
    weights = {name: weight.detach().double() for name, weight in linear_weights(original, "llama")}
    expected = output(original)
    offload(base)
    with pk.patch_peft() as report:
        model = peft.get_peft_model(base, config()).eval()
    assert {layer.name for layer in report.layers} == set(weights)
    own = difference(output(copy.deepcopy(original).double()), expected)
    assert difference(output(model), expected) <= 2 * own
    for name, W in weights.items():
        layer = model.base_model.model.get_submodule(name)
        assert layer.weight.is_meta
        residual = values_of(layer.get_base_layer(), "weight")
        assert residual is not None
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.device.type == B.device.type == "cpu"
        assert A.dtype == B.dtype == torch.float32
        product = B.double() @ A.double()
        assert (W - residual.double() - product).norm() <= 8 * ROUNDOFF[dtype] * W.norm()
        assert energy_deficit(W, A.detach()) <= 1e-5


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_has_the_factors_of_the_model_itself(offload: Any) -> None:
    base = build("llama")
    with pk.patch_peft():
        expected = peft.get_peft_model(copy.deepcopy(base), config())
    offload(base)
    with pk.patch_peft():
        model = peft.get_peft_model(base, config())
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" in name:
            assert torch.equal(parameter, theirs[name])


@pytest.mark.parametrize("offload", [cpu_offload, cpu_offload_in_a_sequence])
def test_training_saving_and_reloading_of_an_offloaded_model(offload: Any, tmp_path: Path) -> None:
    base, other = build("llama"), build("llama")
    original = output(base)
    offload(base)
    with pk.patch_peft():
        model = peft.get_peft_model(base, config())
    ids = torch.arange(12)[None]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None
            parameter.data -= 0.05 * parameter.grad / parameter.grad.norm()
    trained = output(model.eval())
    assert difference(trained, original) > 1e-3
    with torch.no_grad(), pk.original_model(model):
        assert difference(output(model), original) <= 1e-6
    model.save_pretrained(tmp_path)
    offload(other)
    with pk.patch_peft() as report:
        loaded = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert report.layers
    assert torch.equal(output(loaded), trained)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("second", [False, True])
def test_the_residual_of_an_offloaded_model_is_saved(offload: Any, second: bool, tmp_path: Path) -> None:
    base = build("llama")
    original = copy.deepcopy(base)
    offload(base)
    with pk.patch_peft():
        model = peft.get_peft_model(base, config()).eval()
        if second:  # whose initial factors are not the subtracted ones
            model.add_adapter("second", config(r=4))
    name = "second" if second else "default"
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data.mul_(2.0)  # instead of training
    before = output(model)
    pk.save_pissa(model, tmp_path / "out", adapter_name=name)
    assert torch.equal(output(model), before)
    loaded = type(base).from_pretrained(tmp_path / "out")
    stock = peft.PeftModel.from_pretrained(loaded, tmp_path / "out" / "pissa_init").eval()
    own = difference(output(copy.deepcopy(original).double()), output(original))
    assert difference(output(stock), output(original)) <= 2 * own
    layer = model.base_model.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.weight.is_meta


def test_a_second_adapter_of_an_offloaded_model_shares_the_residual() -> None:
    base = build("llama")
    original = output(base)
    cpu_offload(base)
    with pk.patch_peft() as report:
        model = peft.get_peft_model(base, config())
        model.add_adapter("second", config())
    assert len(report.layers) == 2 * 14
    for name in ("default", "second"):
        model.set_adapter(name)
        assert difference(output(model.eval()), original) <= 1e-6


def test_layers_of_an_offloaded_model_that_are_tied_are_refused() -> None:
    base = build("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    before = output(base)
    cpu_offload(base)
    with pk.patch_peft(), pytest.raises(ValueError, match=r"^layer 'lm_head'.* is tied to model\.embed_tokens\.weight"):
        peft.get_peft_model(base, config(target_modules=["q_proj", "lm_head"]))
    assert torch.equal(output(base), before)


def test_a_weight_on_disk_is_refused_and_its_files_stay(tmp_path: Path) -> None:
    base = build("llama")
    accelerate.disk_offload(base, tmp_path, execution_device="cpu")
    before = output(base)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pk.patch_peft(), pytest.raises(ValueError, match=r"^layer 'model.layers.0.self_attn.q_proj'.*to disk"):
        peft.get_peft_model(base, config())
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert torch.equal(output(base), before)


def test_a_model_partly_on_disk_is_refused_before_a_weight_in_memory_changes(tmp_path: Path) -> None:
    base = build("llama")
    before = output(base)
    state = {name: value.detach() for name, value in base.state_dict().items()}
    on_disk = {name: value for name, value in state.items() if "layers.1." in name}
    accelerate.utils.offload_state_dict(tmp_path, on_disk)
    kept = {name: value for name, value in state.items() if name not in on_disk}
    values = OffloadedWeightsLoader(state_dict=kept, save_folder=tmp_path)
    attach_align_device_hook(base, execution_device="cpu", offload=True, weights_map=values)
    copies = {name: value.clone() for name, value in kept.items()}
    with pk.patch_peft(), pytest.raises(ValueError, match=r"^layer 'model.layers.1.self_attn.q_proj'.*to disk"):
        peft.get_peft_model(base, config())
    assert all(torch.equal(value, copies[name]) for name, value in kept.items())
    assert torch.equal(output(base), before)


def test_weights_that_a_module_loads_for_its_children_are_refused() -> None:
    base = build("llama")
    before = output(base)
    accelerate.cpu_offload(base, execution_device="cpu", preload_module_classes=["LlamaAttention"])
    with pk.patch_peft(), pytest.raises(ValueError, match=r"^layer 'model.layers.0.self_attn.q_proj'.*preload_module"):
        peft.get_peft_model(base, config(target_modules=["q_proj"]))
    assert torch.equal(output(base), before)


def test_dora_on_an_offloaded_weight_is_refused() -> None:
    base = build("llama")
    before = output(base)
    cpu_offload(base)
    with pk.patch_peft(), pytest.raises(ValueError, match=r"^layer 'model.layers.0.self_attn.q_proj'.*DoRA reads"):
        peft.get_peft_model(base, config(use_dora=True))
    assert torch.equal(output(base), before)


def test_resident_parameters_are_the_memory_of_the_hook() -> None:
    base = build("llama")
    cpu_offload(base)
    linear = base.model.layers[0].mlp.up_proj
    empty, values = linear.weight, values_of(linear, "weight")
    assert values is not None
    with resident(base):
        assert linear.weight.data_ptr() == values.data_ptr()
        linear.weight.data.fill_(1.0)  # in place
        linear.weight.requires_grad_(False)
    assert linear.weight is empty
    assert empty.is_meta
    assert not empty.requires_grad
    assert bool((values == 1).all())
    with resident(base):
        linear.weight.data = torch.full_like(values, 2.0)  # by another tensor
    assert bool((values == 2).all())
    assert torch.equal(linear(torch.ones(96)), torch.full((288,), 192.0))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_model_without_values_is_left_alone_with_one_warning(low_cpu_mem_usage: bool) -> None:
    with torch.device("meta"):
        base = nn.Sequential(*(nn.Linear(24, 24) for _ in range(6)))
    with pk.patch_peft() as report, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.get_peft_model(base, config(target_modules=r"\d"), low_cpu_mem_usage=low_cpu_mem_usage)
    assert report.layers == []
    messages = [str(warning.message) for warning in caught if "PiSSA" in str(warning.message)]
    assert len(messages) == 1
    assert messages[0].startswith("layer '0', weight (24, 24), ")
    assert "and 2 more: the weight or the adapter is on the meta device" in messages[0]


@pytest.fixture
def one_process() -> Any:
    import torch.distributed as dist

    names = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    before = dict(os.environ)
    os.environ.update(names)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def test_weights_after_fully_shard_of_one_process(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = build("llama")
    mesh = init_device_mesh("cpu", (1,))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(base, mesh=mesh)
    before = output(base)
    with pk.patch_peft() as report:
        model = peft.get_peft_model(base, config())
    assert len(report.layers) == len(list(lora_layers(model)))
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.weight
    assert type(weight.data).__name__ == "DTensor"
    assert float((output(model) - before).abs().max()) <= 1e-5 * float(before.abs().max())
    with pk.original_model(model):
        assert float((output(model) - before).abs().max()) <= 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_weights_inside_of_fsdp_are_refused(one_process: None, use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(build("llama"), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pk.patch_peft(), pytest.raises(ValueError, match=r"q_proj'.*FullyShardedDataParallel.*wrap the model after"):
        peft.get_peft_model(wrapped, config())


def test_fake_weights_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        base = nn.Sequential(nn.Linear(24, 24))
    with pk.patch_peft(), pytest.raises(ValueError, match=r"^layer '0'.*FakeTensor"):
        peft.get_peft_model(base, config(target_modules=["0"]))
