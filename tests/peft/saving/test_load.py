"""Loading an adapter under the hook: the residual that it was trained on, or a refusal."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.peft.saving import sidecar

from ...support.adapted import DTYPES, NAMES, allowed, config, lora_layers, make, moved, no_svd, residuals, train
from ...support.models import build, output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_adapter_is_loaded_bit_for_bit_without_an_svd(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapted = make(name, dtype)
    train(adapted)
    adapted.save_pretrained(tmp_path)  # after the patch has ended
    no_svd(monkeypatch)
    with pk.patch_peft(seed=5) as report, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    for key, residual in residuals(adapted).items():
        assert torch.equal(residual, residuals(loaded)[key])
    assert torch.equal(output(loaded), output(adapted))
    assert moved(output(base), output(loaded)) > 3 * allowed(dtype)
    assert [layer.seed for layer in report.layers] == [0] * len(lora_layers(adapted))
    # the loaded model can be saved and loaded again
    loaded.save_pretrained(tmp_path / "again")
    with pk.patch_peft():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    assert torch.equal(output(again), output(adapted))


def test_an_adapter_on_the_meta_device_gets_its_residual(tmp_path: Path) -> None:
    base, adapted = make("llama", torch.float32)
    train(adapted)
    adapted.save_pretrained(tmp_path)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(output(loaded), output(adapted))


def test_a_second_adapter_through_load_adapter(tmp_path: Path) -> None:
    base, adapted = make("llama", torch.float32)
    train(adapted)
    adapted.save_pretrained(tmp_path)
    plain = peft.get_peft_model(copy.deepcopy(base), config("llama", init_lora_weights=True), adapter_name="plain")
    with pk.patch_peft():
        plain.load_adapter(tmp_path, "trained")
    plain.set_adapter("trained")
    assert moved(output(adapted), output(plain.eval())) <= allowed(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_onto_a_base_model_of_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """The function is the same to the rounding of the coarser dtype."""
    other = DTYPES[1 - DTYPES.index(dtype)]
    base, adapted = make("llama", dtype)
    train(adapted)
    adapted.save_pretrained(tmp_path)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base).to(other), tmp_path).eval()
    assert moved(output(adapted), output(loaded)) <= 2 * allowed(torch.bfloat16)


def test_another_base_model_is_refused_and_unchanged(tmp_path: Path) -> None:
    base, adapted = make("llama", torch.float32)
    adapted.save_pretrained(tmp_path)
    pk.save_pissa(adapted, tmp_path / "residual")
    residual = type(base).from_pretrained(tmp_path / "residual").eval()
    before = output(residual)
    # layers run at the same time, so any of them may be the first
    layer = r"^layer 'model\.layers\.\d\.\w+\.\w+', weight \(\d+, \d+\): "
    refusal = layer + "the weight is not the one .* neither its residual nor another"
    with pytest.raises(ValueError, match=refusal), pk.patch_peft():
        peft.PeftModel.from_pretrained(residual, tmp_path)
    assert torch.equal(before, output(residual))


def test_a_checkpoint_is_not_loaded_onto_another_residual(tmp_path: Path) -> None:
    """A trainer resumes like this: the adapter exists, and only its values are loaded."""
    base, adapted = make("llama", torch.float32)
    expected = output(adapted)
    adapted.save_pretrained(tmp_path)
    train(adapted)
    with pk.patch_peft():
        adapted.load_adapter(tmp_path, "default")
    assert torch.equal(expected, output(adapted))
    stock = peft.get_peft_model(base, config("llama", init_lora_weights="pissa_niter_2")).eval()
    before = output(stock)
    layer = r"^layer 'model\.layers\.0\.self_attn\.q_proj', weight \(96, 96\): "
    refusal = layer + "the weight is not the residual that the adapter"
    with pytest.raises(ValueError, match=refusal), pk.patch_peft():
        stock.load_adapter(tmp_path, "default")
    assert torch.equal(before, output(stock))


def test_a_damaged_sidecar_is_refused(tmp_path: Path) -> None:
    base, adapted = make("llama", torch.float32)
    adapted.save_pretrained(tmp_path)
    path = tmp_path / sidecar.INITIAL_NAME
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its contents do not match"), pk.patch_peft():
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match="does not hold the initial factors"), pk.patch_peft():
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_without_the_sidecar_the_residual_is_computed_again(tmp_path: Path) -> None:
    base, adapted = make("llama", torch.float32)
    train(adapted)
    adapted.save_pretrained(tmp_path)
    (tmp_path / sidecar.INITIAL_NAME).unlink()
    with pk.patch_peft(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(output(loaded), output(adapted))
    other = copy.deepcopy(base)
    other.model.layers[1].mlp.up_proj.weight.data *= 1.01
    with (
        pk.patch_peft(),
        pytest.warns(UserWarning, match=r"1 layers \(the first is 'model\.layers\.1\.mlp\.up_proj'\)"),
    ):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_an_adapter_of_an_unseeded_sketch_gives_a_warning(tmp_path: Path) -> None:
    base = build("llama")
    stock = peft.get_peft_model(copy.deepcopy(base), config("llama", init_lora_weights="pissa_niter_4"))
    stock.save_pretrained(tmp_path)
    assert not (tmp_path / sidecar.INITIAL_NAME).exists()
    with pk.patch_peft(), pytest.warns(UserWarning, match="its sketch was not seeded") as caught:
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert [warning.filename for warning in caught if "not seeded" in str(warning.message)] == [__file__]
