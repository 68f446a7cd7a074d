"""Adapters of convolutions and of nn.MultiheadAttention, merged as PEFT merges them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import pissa_kernels as pk

from ..support.checkpoints import tensors

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def vit() -> Any:
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(**VISION, image_size=16, patch_size=4))


def siglip() -> Any:
    """Its head has an nn.MultiheadAttention."""
    torch.manual_seed(0)
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, image_size=16, patch_size=4))


def trained(model: Any, folder: Path, **settings: Any) -> Any:
    """A LoRA of PEFT on a checkpoint of a model, with factors that are not zero."""
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "init_lora_weights": False} | settings))
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.save_pretrained(folder / "trained")
    return adapted


@pytest.mark.parametrize(
    ("make", "targets", "layers"),
    [
        (vit, ["projection", "q_proj"], 2),
        (siglip, ["patch_embedding"], 1),
        (siglip, ["attention", "position_embedding"], 3),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_as_peft_merges_them(make: Any, targets: list[str], layers: int, rslora: bool, tmp_path: Path) -> None:
    adapted = trained(make(), tmp_path, target_modules=targets, use_rslora=rslora)
    report = pk.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "merged", progress=False)
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    found, wanted, base = (tensors(tmp_path / name) for name in ("merged", "peft", "base"))
    assert found.keys() == wanted.keys() == base.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-6), key
    changed = {key for key in wanted if not torch.allclose(wanted[key], base[key])}
    assert {layer.tensor for layer in report.layers} == changed
    assert len(changed) == layers


def test_the_output_of_a_merged_attention_is_that_of_the_adapted_one(tmp_path: Path) -> None:
    """PEFT's forward pass adds the product of the output projection as often as its merge does."""
    adapted = trained(siglip(), tmp_path, target_modules=["attention"]).eval()
    pk.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "merged", progress=False)
    merged = transformers.SiglipVisionModel.from_pretrained(tmp_path / "merged").eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = [model(pixel_values=pixels).pooler_output for model in (adapted, merged)]
        before = siglip().eval()(pixel_values=pixels).pooler_output
    assert float((outputs[0] - outputs[1]).norm()) <= 1e-5 * float(outputs[0].norm())
    assert float((outputs[0] - before).norm()) > 1e-2 * float(before.norm())


def test_a_convolution_with_groups_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[4, 4], depths=[1, 1], num_stages=2)
    trained(transformers.ConvNextModel(config), tmp_path, target_modules=["dwconv"])
    words = r"layer '\S+dwconv' is a convolution with 4 groups: .*; load the adapter with PEFT"
    with pytest.raises(ValueError, match=words):
        pk.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
