"""From a quantized model under the hook to a full checkpoint, by files alone."""

from __future__ import annotations

from pathlib import Path

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
    import transformers

    base = saved(tmp_path / "base", dtype=torch.float32)
    with pk.patch_peft(original=base):
        model = peft.get_peft_model(loaded(base, kind, torch.float32), lora()).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained")
    pk.save_pissa(model, tmp_path / "residual")
    pk.merge_checkpoint(tmp_path / "residual", tmp_path / "trained", tmp_path / "merged", progress=False)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    original = transformers.AutoModelForCausalLM.from_pretrained(base)
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
