"""From a quantized model under the hook to a full checkpoint, by files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pissa_kernels as pk

from ..support.quantized import FORMATS, loaded, lora, saved

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(24).reshape(2, 12) * 4


@pytest.mark.parametrize("kind", FORMATS)
def test_the_merged_checkpoint_is_the_trained_model(kind: str, tmp_path: Path) -> None:
    import peft

    base = saved(tmp_path / "base", dtype=torch.float32)
    with pk.patch_peft(original=base):
        model = peft.get_peft_model(loaded(base, kind, torch.float32), lora()).train()
    train(model)
    model.save_pretrained(tmp_path / "trained")
    pk.save_pissa(model, tmp_path / "residual")
    pk.merge_checkpoint(tmp_path / "residual", tmp_path / "trained", tmp_path / "merged", progress=False)
    check_merged(tmp_path, model, kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_from_init_to_the_merged_checkpoint(kind: str, tmp_path: Path) -> None:
    import peft
    import transformers

    base, out = saved(tmp_path / "base", dtype=torch.float32), tmp_path / "out"
    report = pk.init_checkpoint(base, out, rank=8, quantize=kind, double_quant=kind == "nf4", progress=False)
    assert pk.verify_checkpoint(base, out, progress=False) == []
    # stock transformers and PEFT
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    model = peft.PeftModel.from_pretrained(model, out / "pissa_init", is_trainable=True).train()
    train(model)
    model.save_pretrained(tmp_path / "trained")
    pk.merge_checkpoint(out, tmp_path / "trained", tmp_path / "merged", progress=False)
    check_merged(tmp_path, model, kind)
    converted = pk.convert_adapter(tmp_path / "trained", out / "pissa_init", tmp_path / "lora", base=base)
    recorded = [layer.quantization.error for layer in report.layers if layer.quantization is not None]
    found = {layer.name: layer.dropped.error for layer in converted.layers if layer.dropped is not None}
    assert [found[layer.name] for layer in report.layers] == pytest.approx(recorded, rel=1e-4)


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def check_merged(folder: Path, model: Any, kind: str) -> None:
    """The merged checkpoint computes what the trained model does, and not what the original one does."""
    import transformers

    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert not hasattr(merged.config, "quantization_config")
    original = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        expected, found, before = (each(TOKENS).logits.double() for each in (model, merged, original))
    # int8 layers quantize their inputs as well
    tolerance = 3e-2 if kind == "int8" else 1e-5
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    assert float((found - before).norm()) > 5 * tolerance * float(expected.norm())


def test_an_adapter_of_another_start_is_refused(tmp_path: Path) -> None:
    import peft

    base = saved(tmp_path / "base")
    for name, rank in (("one", 8), ("other", 4)):
        with pk.patch_peft(original=base):
            model = peft.get_peft_model(loaded(base), lora(r=rank))
        model.save_pretrained(tmp_path / name)
        pk.save_pissa(model, tmp_path / f"residual-{name}")
    with pytest.raises(ValueError, match=r"PEFT changed in memory, and .*residual-one does not hold that"):
        pk.merge_checkpoint(tmp_path / "residual-one", tmp_path / "other", tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
