"""PiSSA by transformers' and by diffusers' own ``add_adapter``, under the same hook."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import pissa_kernels as pk

from ...support.architectures import ARCHITECTURES, inputs
from ...support.kinds_operations import off
from ...support.kinds_reference import rounded_deficit
from ...support.reference import ROUNDOFF, energy_deficit

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.slow),
]
DEFICIT = {torch.float32: 1e-6, torch.bfloat16: 2.5e-6}
# layers of each model, by the last parts of their names
TARGETS: dict[str, list[str]] = {
    "vit": ["q_proj", "v_proj", "fc1", "projection"],
    "whisper": ["k_proj", "fc2", "out_proj"],
    "t5": ["q", "v", "wo", "relative_attention_bias"],
    "unet": ["to_q", "to_v", "conv1", "conv_in", "conv_shortcut", "downsamplers.0.conv", "proj_in"],
}
UNET = "unet"

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name == UNET and importlib.util.find_spec("diffusers") is None,
                reason="needs diffusers, which is not installed",
            ),
        )
        for name in TARGETS
    ],
)


@pytest.fixture(autouse=True)
def any_version_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 asks for a version of PEFT that is not released; its calls are those of the present one."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")


def unet() -> Any:
    """A tiny UNet with convolutions of 1×1 and 3×3, one of stride 2, and cross-attention."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


@dataclass
class Case:
    """A base model and how it is called.

    Attributes:
        base: the untouched model.
        call: the output of such a model.
    """

    base: Any
    call: Callable[[Any], Tensor]

    @property
    def exact(self) -> Tensor:
        """The base's output in float64."""
        return self.call(copy.deepcopy(self.base).double())

    @property
    def tolerance(self) -> float:
        """Three times what rounding in the base's dtype does to its output."""
        return 3 * max(off(self.exact, self.call(self.base)), ROUNDOFF[self.base.dtype])


def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    base = (unet() if name == UNET else ARCHITECTURES[name].build()).to(dtype)

    def call(model: Any) -> Tensor:
        with torch.no_grad():
            if name == UNET:
                generator = torch.Generator().manual_seed(0)
                sample, states = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 12)))
                steps = torch.tensor([3, 700])
                found = model(sample.to(dtype).to(model.dtype), steps, states.to(dtype).to(model.dtype))
                return found.sample  # type: ignore[no-any-return]
            given = {
                key: value.to(dtype).to(model.dtype) if value.is_floating_point() else value
                for key, value in inputs(name).items()
            }
            return model(**given).logits  # type: ignore[no-any-return]

    return Case(base, call)


def config(name: str, **changes: Any) -> peft.LoraConfig:
    settings = {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa", "target_modules": TARGETS[name]}
    return peft.LoraConfig(**(settings | changes))


def added(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Case, Any, Any]:
    """The base, the model with the adapter, and the report."""
    found = case(name, dtype)
    model = copy.deepcopy(found.base)
    with pk.patch_peft() as report:
        model.add_adapter(config(name, **changes))  # casts no adapter to float32, unlike get_peft_model
    return found, model.eval(), report


def train(model: Any) -> None:
    """Move every A and B, as training does."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.3 * parameter.detach().float().abs().mean() * noise).to(parameter)


@every_dtype
@every_model
def test_every_layer_is_exact_and_the_output_does_not_change(name: str, dtype: torch.dtype) -> None:
    found, model, report = added(name, dtype)
    names = {
        key
        for key, module in found.base.named_modules()
        if getattr(module, "weight", None) is not None and f".{key}".endswith(tuple(f".{end}" for end in TARGETS[name]))
    }
    assert {layer.name for layer in report.layers} == names
    assert all(any(f".{key}".endswith(f".{end}") for key in names) for end in TARGETS[name])
    for layer in report.layers:
        weight, lora = found.base.get_submodule(layer.name).weight.detach(), model.get_submodule(layer.name)
        is_embedding = isinstance(lora.get_base_layer(), nn.Embedding)
        W = weight.double().mT if is_embedding else weight.double().flatten(1)
        A = lora.lora_embedding_A["default"] if is_embedding else lora.lora_A["default"].weight.flatten(1)
        assert layer.shape == tuple(W.shape)
        assert layer.rank == 2
        assert layer.certificate.converged
        best = rounded_deficit(W, 2, layer.scaling, dtype)
        assert energy_deficit(W, A.detach()) <= max(DEFICIT[dtype], best), layer.name
    assert off(found.exact, found.call(model)) <= found.tolerance


@every_dtype
@every_model
def test_adapters_off_after_training(name: str, dtype: torch.dtype) -> None:
    found, model, _ = added(name, dtype)
    train(model)
    trained = found.call(model)
    assert off(found.exact, trained) > 3 * found.tolerance
    model.disable_adapters()
    assert off(found.exact, found.call(model)) <= found.tolerance
    model.enable_adapters()
    assert torch.equal(trained, found.call(model))
    with pk.original_model(model):
        assert off(found.exact, found.call(model)) <= found.tolerance


@every_model
def test_a_second_adapter(name: str) -> None:
    found, model, _ = added(name)
    train(model)
    first = found.call(model)
    with pk.patch_peft():
        model.add_adapter(config(name, r=1), adapter_name="second")
    model.set_adapter("second")
    assert off(found.exact, found.call(model)) <= found.tolerance
    model.set_adapter("default")
    assert off(first, found.call(model)) <= found.tolerance


@every_model
def test_another_adapter_after_the_only_one_is_deleted(name: str) -> None:
    found, model, _ = added(name)
    train(model)
    model.delete_adapters("default") if name == UNET else model.delete_adapter("default")
    assert off(found.exact, found.call(model)) <= found.tolerance
    with pk.patch_peft():
        model.add_adapter(config(name, r=1), adapter_name="second")
    assert off(found.exact, found.call(model)) <= found.tolerance


@pytest.mark.parametrize("name", [name for name in TARGETS if name != UNET])
def test_transformers_saves_and_loads_the_adapter(name: str, tmp_path: Path) -> None:
    found, model, _ = added(name)
    train(model)
    trained = found.call(model)
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(found.base)
    with pk.patch_peft() as report:
        loaded.load_adapter(str(tmp_path))
    assert report.layers
    assert off(trained, found.call(loaded.eval())) <= found.tolerance
