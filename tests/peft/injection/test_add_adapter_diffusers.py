"""What diffusers does with adapters by itself: saved, fused, scaled, unloaded."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

import pissa_kernels as pk

from ...support.kinds_operations import off
from .test_add_adapter import DTYPES, UNET, added, config, train

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs diffusers, which is not installed"
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def test_it_saves_and_loads_the_adapter(tmp_path: Path) -> None:
    found, model, _ = added(UNET)
    train(model)
    trained = found.call(model)
    model.save_lora_adapter(tmp_path)
    loaded = copy.deepcopy(found.base)
    with pk.patch_peft() as report:
        loaded.load_lora_adapter(tmp_path, prefix=None, adapter_name="default", use_safetensors=True)
    assert report.layers
    assert off(trained, found.call(loaded)) <= found.tolerance


@every_dtype
def test_it_fuses_and_unfuses(dtype: torch.dtype) -> None:
    found, model, _ = added(UNET, dtype)
    train(model)
    trained = found.call(model)
    model.fuse_lora()
    assert off(trained, found.call(model)) <= 2 * found.tolerance
    model.unfuse_lora()
    assert off(trained, found.call(model)) <= 2 * found.tolerance
    model.disable_lora()
    assert off(found.exact, found.call(model)) <= 2 * found.tolerance


@pytest.mark.parametrize("scale", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_weights_of_adapters(scale: float) -> None:
    """A weight w of an adapter is W + w·(s·B·A − s·B₀·A₀): at 0 the base."""
    found, model, _ = added(UNET)
    train(model)
    exact = copy.deepcopy(found.base).double()
    initial = added(UNET)[1]
    for key, module in initial.named_modules():
        if hasattr(module, "lora_A"):
            changed = model.get_submodule(key)
            change = changed.get_delta_weight("default").double() - module.get_delta_weight("default").double()
            exact.get_submodule(key).weight.data += scale * change
    model.set_adapters(["default"], [scale])
    assert off(found.call(exact), found.call(model)) <= found.tolerance


def test_it_unloads_the_original_weights() -> None:
    """``unload_lora`` takes PEFT's layers out by itself, and leaves what they store."""
    found, model, _ = added(UNET)
    train(model)
    model.unload_lora()
    assert model.state_dict().keys() == found.base.state_dict().keys()
    assert off(found.exact, found.call(model)) <= found.tolerance
    with pk.patch_peft():
        model.add_adapter(config(UNET, r=1))
    assert off(found.exact, found.call(model)) <= found.tolerance


def test_it_unloads_what_it_has_fused() -> None:
    found, model, _ = added(UNET)
    train(model)
    trained = found.call(model)
    model.fuse_lora()
    model.unload_lora()
    assert model.state_dict().keys() == found.base.state_dict().keys()
    assert off(trained, found.call(model)) <= 2 * found.tolerance


def test_it_unloads_after_the_adapter_is_deleted() -> None:
    found, model, _ = added(UNET)
    train(model)
    model.delete_adapters("default")
    model.unload_lora()
    assert off(found.exact, found.call(model)) <= found.tolerance


def test_it_fuses_no_projections_of_residuals() -> None:
    found, model, _ = added(UNET)
    train(model)
    trained = found.call(model)
    with pytest.raises(ValueError, match=r"^layer '.*fuse_qkv_projections copies stored weights"):
        model.fuse_qkv_projections()
    assert torch.equal(trained, found.call(model))
    model.fuse_lora()
    model.unload_lora()
    model.fuse_qkv_projections()
    assert off(trained, found.call(model)) <= 2 * found.tolerance


def test_it_scales_adapters_in_the_call() -> None:
    found, model, _ = added(UNET)
    train(model)
    generator = torch.Generator().manual_seed(0)
    sample, states = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 12)))
    with torch.no_grad():
        without = model(sample, torch.tensor([3, 700]), states, cross_attention_kwargs={"scale": 0.0}).sample
    assert off(found.exact, without) <= found.tolerance


def test_a_scaled_fusion_is_refused_before_anything_is_scaled() -> None:
    found, model, _ = added(UNET)
    train(model)
    trained = found.call(model)
    with pytest.raises(ValueError, match=r"^layer '.*fuse_lora\(lora_scale=0\.5\).*lora_scale=1"):
        model.fuse_lora(lora_scale=0.5)
    assert torch.equal(trained, found.call(model))
