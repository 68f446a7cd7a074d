"""Quantized layers on a GPU, and streamed through it: the stored error, and the codes of bitsandbytes there."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers

from ..support.quantized import FORMATS, codes, dequantized, loaded, lora, saved

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_every_layer(way: str, kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = saved(tmp_path / "base")
    originals = {name: value.double() for name, value in load_file(base / "model.safetensors").items()}
    model = loaded(base, kind)
    model = model.to("cuda") if way == "resident" else model
    with pk.patch_peft(original=base, device="cuda" if way == "streamed" else None) as report:
        adapted = peft.get_peft_model(model, lora())
    for entry, (name, layer) in zip(report.layers, lora_layers(adapted), strict=True):
        module = layer.get_base_layer()
        A, B = (factor["default"].weight.detach().cpu().double() for factor in (layer.lora_A, layer.lora_B))
        E = originals[f"{name}.weight"] - dequantized(module).cpu() - layer.scaling["default"] * B @ A
        assert codes(module).is_cuda == (way == "resident")
        assert entry.quantization is not None
        assert entry.quantization.error == pytest.approx(float(E.norm()), rel=1e-3)
        assert entry.quantization.error < entry.quantization.error_without


def test_reload(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    with pk.patch_peft(original=base):
        model = peft.get_peft_model(loaded(base).to("cuda"), lora())
    model.save_pretrained(tmp_path / "adapter")
    with pk.patch_peft(original=base):
        again = peft.PeftModel.from_pretrained(loaded(base).to("cuda"), tmp_path / "adapter")
    for (_, one), (_, other) in zip(lora_layers(model), lora_layers(again), strict=True):
        assert torch.equal(codes(one.get_base_layer()), codes(other.get_base_layer()))
