"""A trained PiSSA adapter converted by ``save_pretrained``, and saved with its sidecar, for all that PEFT trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import pissa_kernels as pk

from ..support.models import build, output
from .test_models import config
from .test_save import DTYPES, allowed, moved
from .test_start import SETTINGS, stored, trained

CONVERTIBLE = {key: value for key, value in SETTINGS.items() if value[1].get("bias", "none") == "none"}


def make(setting: str, dtype: torch.dtype, folder: Path, adapter_name: str = "default") -> tuple[Any, Any]:
    name, changes = SETTINGS[setting]
    base = stored(build(name, dtype), folder / "base")
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base), config(name, **changes), adapter_name=adapter_name)
    return base, trained(model.eval())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("adapter_name", ["default", "first"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", CONVERTIBLE)
def test_the_base_model_with_the_converted_adapter_is_the_trained_model(
    setting: str, dtype: torch.dtype, adapter_name: str, tmp_path: Path
) -> None:
    base, model = make(setting, dtype, tmp_path, adapter_name)
    expected = output(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pk.save_pissa(model, tmp_path / "out", adapter_name=adapter_name)
    model.save_pretrained(
        tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "out" / "pissa_init")
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    folder = tmp_path / "lora" / ("" if adapter_name == "default" else adapter_name)
    assert not any("base_layer" in key for key in tensors(folder))
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert moved(expected, output(plain)) <= allowed(dtype)
    with plain.disable_adapter():
        assert torch.equal(output(plain), output(base))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_saved_adapter_loads_onto_the_original_model(setting: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, model = make(setting, dtype, tmp_path)
    model.save_pretrained(tmp_path / "trained")
    assert not any(key.endswith("base_layer.weight") for key in tensors(tmp_path / "trained"))
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "trained").eval()
    assert torch.equal(output(loaded), output(model))
