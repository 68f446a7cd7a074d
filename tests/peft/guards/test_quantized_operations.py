"""What PEFT offers on a model with quantized residuals: right or refused, and equal to float64 references."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers
from pissa_kernels.peft.weights.record import records
from tests.support.quantized import FORMATS, codes, dequantized, loaded, lora, pack_for_cpu, saved

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("quantized") / "base")


@pytest.fixture(params=list(FORMATS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(folder: Path, kind: str = "nf4", config: Any = None) -> Any:
    with pk.patch_peft(original=folder):
        return peft.get_peft_model(loaded(folder, kind), config or lora()).train()


def trained(folder: Path, kind: str = "nf4", config: Any = None) -> tuple[Any, dict[str, Tensor]]:
    """A trained model, and W − E of every layer: what it computed with before."""
    model = made(folder, kind, config)
    initial = {name: dequantized(layer.get_base_layer()) + product(layer) for name, layer in lora_layers(model)}
    step(model)
    return model, initial


def product(layer: Any, name: str = "default") -> Tensor:
    A, B = (factor[name].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
    return layer.scaling[name] * B @ A


def step(model: Any, rate: float = 3e-3) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for _ in range(3):
        model(inputs(), labels=inputs()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def inputs() -> Tensor:
    return torch.arange(24).reshape(2, 12) * 4


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(inputs()).logits.float()


def near(one: Tensor, other: Tensor, tolerance: float = 2e-2) -> bool:
    """Equal to the rounding of bfloat16 activations through the model (and to int8's of activations)."""
    return float((one - other).norm()) <= tolerance * float(other.norm())


def same_layers(model: Any, expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every layer computes with the expected weight: x = I through the layer in float32."""
    for name, layer in lora_layers(model):
        x = torch.eye(layer.in_features)
        with torch.no_grad():
            found = layer(x).double() - (
                layer(torch.zeros(1, layer.in_features)).double() if layer.bias is not None else 0
            )
        off = float((found.mT - expected[name]).norm() / expected[name].norm())
        assert off < tolerance, (name, off)


def test_training_changes_the_adapter_alone(folder: Path, kind: str) -> None:
    model = made(folder, kind)
    before = {name: codes(layer.get_base_layer()) for name, layer in lora_layers(model)}
    first = float(model(inputs(), labels=inputs()).loss.detach())
    step(model)
    assert float(model(inputs(), labels=inputs()).loss.detach()) < first
    assert all(torch.equal(before[name], codes(layer.get_base_layer())) for name, layer in lora_layers(model))


def test_the_original_model(folder: Path, kind: str) -> None:
    model = made(folder, kind)
    start = logits(model)
    step(model)
    after = logits(model)
    with pk.original_model(model):
        assert near(logits(model), start)
    with model.disable_adapter():
        assert near(logits(model), start)
    assert not near(after, start)
    assert torch.equal(logits(model), after)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_layers_compute_the_weight_and_the_changes(kind: str, folder: Path) -> None:
    model, _ = trained(folder, kind)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.weight.quant_state.dtype = torch.float32  # the values are exact then, and so is the comparison
    layers = dict(lora_layers(model))
    exact = {name: dequantized(layer.get_base_layer()) for name, layer in layers.items()}
    same_layers(model, {name: exact[name] + product(layer) for name, layer in layers.items()})
    model.add_adapter("second", lora(r=4, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("second")
    W = {name: exact[name] + s_initial(layer) for name, layer in layers.items()}
    same_layers(model, W)
    plain = lora(init_lora_weights=True, r=4)
    model.add_adapter("plain", plain)
    model.set_adapter("plain")
    for layer in layers.values():
        layer.lora_B["plain"].weight.data.normal_(0, 0.01)
    same_layers(model, {name: W[name] + product(layer, "plain") for name, layer in layers.items()})
    model.delete_adapter("plain")
    model.set_adapter("default")
    same_layers(model, {name: exact[name] + product(layer) for name, layer in layers.items()})


def s_initial(layer: Any) -> Tensor:
    """s·B₀·A₀, from the record."""
    from pissa_kernels.peft.weights.record import records

    record = records(layer)[0]
    return record.report.scaling * record.lora_B.double() @ record.lora_A.double()


def test_a_second_adapter_of_equal_settings_shares(folder: Path, kind: str) -> None:
    model = made(folder, kind)
    start, before = logits(model), {name: codes(layer.get_base_layer()) for name, layer in lora_layers(model)}
    step(model)
    after = logits(model)
    model.add_adapter("reference", lora())
    model.set_adapter("reference")
    assert near(logits(model), start, 1e-6)
    model.set_adapter("default")
    assert torch.equal(logits(model), after)
    assert all(torch.equal(before[name], codes(layer.get_base_layer())) for name, layer in lora_layers(model))


def test_other_settings_after_the_first_adapter_is_gone(folder: Path) -> None:
    model = made(folder)
    model.add_adapter("plain", lora(init_lora_weights=True, target_modules=["k_proj"]))
    model.delete_adapter("default")
    model.add_adapter("other", lora(r=4, target_modules=["q_proj"]))  # read from the original again
    fresh = made(folder, config=lora(r=4, target_modules=["q_proj"]))
    ours, theirs = (model.base_model.model.model.layers[0].self_attn.q_proj for model in (model, fresh))
    assert torch.equal(codes(ours.get_base_layer()), codes(theirs.get_base_layer()))


def test_merge_and_unmerge(folder: Path, kind: str) -> None:
    model, _ = trained(folder, kind)
    before = {name: codes(layer.get_base_layer()) for name, layer in lora_layers(model)}
    after = logits(model)
    wanted = {name: dequantized(layer.get_base_layer()) + product(layer) for name, layer in lora_layers(model)}
    model.merge_adapter()
    for name, layer in lora_layers(model):
        assert torch.equal(codes(layer.get_base_layer()), quantized_codes(wanted[name], layer, kind))
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(before[name], codes(layer.get_base_layer())) for name, layer in lora_layers(model))
    assert torch.equal(logits(model), after)
    with pk.original_model(model):
        pass  # known


def quantized_codes(weight: Tensor, layer: Any, kind: str) -> Tensor:
    stored = layer.get_base_layer().weight
    if kind == "int8":
        return bnb.nn.Int8Params(weight.float(), requires_grad=False).to("cpu").data
    return bnb.functional.quantize_4bit(
        weight.float(), blocksize=stored.blocksize, quant_type=kind, compress_statistics=stored.compress_statistics
    )[0]


def test_merging_another_adapter_takes_out_the_first(folder: Path) -> None:
    model, _ = trained(folder)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before, W = codes(layer.get_base_layer()), dequantized(layer.get_base_layer()) + s_initial(layer)
    model.add_adapter("plain", lora(init_lora_weights=True, r=4))
    layer.lora_B["plain"].weight.data.normal_(0, 0.01)
    model.merge_adapter(["plain"])
    assert torch.equal(codes(layer.get_base_layer()), quantized_codes(W + product(layer, "plain"), layer, "nf4"))
    model.unmerge_adapter()
    assert torch.equal(codes(layer.get_base_layer()), before)


def test_a_second_merge_after_the_scaling_has_changed(folder: Path) -> None:
    model, _ = trained(folder)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before, first = codes(layer.get_base_layer()), dequantized(layer.get_base_layer()) + product(layer)
    model.add_adapter("plain", lora(init_lora_weights=True, r=4))
    layer.lora_B["plain"].weight.data.normal_(0, 0.01)
    model.merge_adapter(["default"])
    for each in dict(lora_layers(model)).values():
        each.set_scale("default", 3)
    model.merge_adapter(["plain"])  # beside the first one as it was merged
    wanted = first + product(layer, "plain")
    assert torch.equal(codes(layer.get_base_layer()), quantized_codes(wanted, layer, "nf4"))
    model.unmerge_adapter()
    assert torch.equal(codes(layer.get_base_layer()), before)


def test_merge_and_unload(folder: Path, kind: str) -> None:
    model, _ = trained(folder, kind)
    wanted = {name: dequantized(layer.get_base_layer()) + product(layer) for name, layer in lora_layers(model)}
    layers = dict(lora_layers(model))
    expected = {name: quantized_codes(wanted[name], layer, kind) for name, layer in layers.items()}
    merged = model.merge_and_unload()
    for name, value in expected.items():
        base = merged.get_submodule(name)
        assert type(base).__name__ in ("Linear4bit", "Linear8bitLt")
        assert torch.equal(codes(base), value)


def test_unload_is_refused_but_for_the_recipe(folder: Path, kind: str) -> None:
    model, _ = trained(folder, kind)
    after = logits(model)
    before = {name: codes(layer.get_base_layer()) for name, layer in lora_layers(model)}
    for call in (model.unload, lambda: model.merge_and_unload(adapter_names=[])):
        with pytest.raises(
            ValueError, match=r"layer 'model.layers.0.self_attn.q_proj', weight \(64, 64\): the quantized"
        ):
            call()
        assert torch.equal(logits(model), after)
    model.peft_config["default"].init_lora_weights = True
    residual = model.unload()
    assert all(torch.equal(codes(residual.get_submodule(name)), value) for name, value in before.items())


def test_a_failure_after_some_layers_of_a_second_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pissa_kernels.peft.layers import quantized_layer

    model = made(folder, config=lora(target_modules=["q_proj"]))
    step(model)
    after = logits(model)
    original, calls = quantized_layer.quantized_factors, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError("no memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(quantized_layer, "quantized_factors", failing)
    with pytest.raises(MemoryError, match=r"layer 'model.layers.0"):
        model.add_adapter("second", lora())
    assert torch.equal(logits(model), after)
    fresh = loaded(folder)
    for name, module in model.base_model.model.named_modules():
        if type(module).__name__ == "Linear4bit" and "q_proj" not in name:
            assert torch.equal(codes(module), codes(fresh.get_submodule(name)))


# Saving and loading


def test_reload_gives_the_same_codes(folder: Path, kind: str, tmp_path: Path) -> None:
    model, _ = trained(folder, kind)
    model.save_pretrained(tmp_path)
    with pk.patch_peft(original=folder) as report:
        again = peft.PeftModel.from_pretrained(loaded(folder, kind), tmp_path).train()
    assert [entry.quantization for entry in report.layers] == [
        entry.quantization for entry in pk.Report.read(tmp_path / "pissa_report.json").layers
    ]
    for (_, one), (_, other) in zip(lora_layers(model), lora_layers(again), strict=True):
        assert torch.equal(codes(one.get_base_layer()), codes(other.get_base_layer()))
    assert torch.equal(logits(again), logits(model))


RELOAD = """
import sys, torch, peft, pissa_kernels as pk
from tests.support.quantized import loaded
base, adapter, out = sys.argv[1:]
with pk.patch_peft(original=base):
    model = peft.PeftModel.from_pretrained(loaded(base), adapter).train()
with torch.no_grad():
    torch.save(model(torch.arange(24).reshape(2, 12) * 4).logits.float(), out)
"""


@pytest.mark.slow
def test_reload_in_another_process(folder: Path, tmp_path: Path) -> None:
    model, _ = trained(folder)
    model.save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-c", RELOAD, str(folder), str(tmp_path / "adapter"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_a_reload_without_the_original(folder: Path, tmp_path: Path) -> None:
    model, _ = trained(folder)
    model.save_pretrained(tmp_path)
    with pk.patch_peft(), pytest.raises(TypeError, match="original=FOLDER"):
        peft.PeftModel.from_pretrained(loaded(folder), tmp_path)


def test_a_reload_with_another_format(folder: Path, tmp_path: Path) -> None:
    model, _ = trained(folder)
    model.save_pretrained(tmp_path)
    with pk.patch_peft(original=folder), pytest.raises(ValueError, match="quantized with other settings"):
        peft.PeftModel.from_pretrained(loaded(folder, "fp4"), tmp_path)


def test_save_pissa_and_stock_loading(folder: Path, kind: str, tmp_path: Path) -> None:
    import transformers

    model = made(folder, kind)
    start, before = logits(model), {name: codes(layer.get_base_layer()) for name, layer in lora_layers(model)}
    step(model)
    model.save_pretrained(tmp_path / "trained")
    pk.save_pissa(model, tmp_path / "residual")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "residual").train()
    assert all(torch.equal(codes(base.get_submodule(name)), value) for name, value in before.items())
    initial = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "residual" / "pissa_init").train()
    assert near(logits(initial), start, 1e-6)
    # the trained adapter on the residual: nothing is subtracted again, and no original is needed
    with pk.patch_peft():
        again = peft.PeftModel.from_pretrained(base, tmp_path / "trained").train()
    assert all(torch.equal(codes(layer.get_base_layer()), before[name]) for name, layer in lora_layers(again))
    assert near(logits(again), logits(model), 1e-6)


def test_an_adapter_of_a_16_bit_model(folder: Path, kind: str, tmp_path: Path) -> None:
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    originals = {name.removesuffix(".weight"): value.clone() for name, value in base.state_dict().items()}
    with pk.patch_peft():
        model = peft.get_peft_model(base, lora())
    step(model)
    model.save_pretrained(tmp_path)
    with pk.patch_peft(original=folder) as report:
        again = peft.PeftModel.from_pretrained(loaded(folder, kind), tmp_path).train()
    trained_layers = dict(lora_layers(model))
    for entry, (name, layer) in zip(report.layers, lora_layers(again), strict=True):
        wide, (record,) = trained_layers[name], records(trained_layers[name])
        # W plus the change, without the rounding of the 16-bit residual
        initial = record.report.scaling * record.lora_B.double() @ record.lora_A.double()
        target = originals[name].double() + product(wide) - initial
        off = float((dequantized(layer.get_base_layer()) + product(layer) - target).norm())
        assert entry.quantization is not None
        assert off == pytest.approx(entry.quantization.error, rel=0.01)
        assert entry.quantization.error < entry.quantization.error_without


def test_a_quantized_adapter_on_a_16_bit_model(folder: Path, tmp_path: Path) -> None:
    import transformers

    model, _ = trained(folder)
    model.save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pk.patch_peft(), pytest.raises(ValueError, match=r"trained on a quantized residual \(nf4, blocks of 64"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_two_adapters_of_other_settings_from_files(folder: Path, tmp_path: Path) -> None:
    first, _ = trained(folder)
    first.save_pretrained(tmp_path / "first")
    second, _ = trained(folder, config=lora(r=4))
    second.save_pretrained(tmp_path / "second")
    with pk.patch_peft(original=folder):
        model = peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "first").train()
        model.load_adapter(tmp_path / "second", "second")
    model.set_adapter("second")
    for (name, layer), (_, other) in zip(lora_layers(model), lora_layers(second), strict=True):
        # W − E + ΔW of the second adapter
        W = dequantized(layer.get_base_layer()) + s_initial(layer)
        change = product(other) - s_initial(other)
        with torch.no_grad():
            found = layer(torch.eye(layer.in_features).bfloat16()).double().mT
        assert float((found - W - change).norm()) < 0.01 * float(W.norm()), name


def test_a_model_whose_checkpoint_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    with pk.patch_peft(original="base"):
        model = peft.get_peft_model(loaded(base), lora(target_modules=["q_proj"])).train()
    monkeypatch.chdir("/")
    model.add_adapter("in another folder", lora(target_modules=["v_proj"]))
    base.rename(tmp_path / "moved")
    model.add_adapter("plain", lora(init_lora_weights=True, target_modules=["q_proj"]))
    model.add_adapter("second", lora(r=4, target_modules=["q_proj"]))
    before = logits(model)
    with pytest.raises(TypeError, match=r"layer 'model.layers.0.mlp.up_proj'.*original=FOLDER"):
        model.add_adapter("new", lora(target_modules=["up_proj"]))
    assert torch.equal(logits(model), before)


# What a forward pass on some CPUs does to the codes


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_packed_codes_do_not_fool_the_records(kind: str, folder: Path, tmp_path: Path) -> None:
    import transformers

    model, _ = trained(folder, kind)
    layers = dict(lora_layers(model))
    values = {name: dequantized(layer.get_base_layer()) for name, layer in layers.items()}
    assert pack_for_cpu(model) == len(layers)
    with pk.original_model(model):
        pass
    model.add_adapter("reference", lora())
    pk.save_pissa(model, tmp_path / "residual")
    model.save_pretrained(tmp_path / "adapter")
    residual = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "residual")
    for name, value in values.items():
        for found in (dequantized(residual.get_submodule(name)), dequantized(layers[name].get_base_layer())):
            # the scales are rounded to bfloat16 once
            assert float((found - value).norm()) < 2**-8 * float(value.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_packed_model_gets_an_adapter(dtype: torch.dtype, folder: Path) -> None:
    packed, plain = loaded(folder, dtype=dtype), loaded(folder, dtype=dtype)
    pack_for_cpu(packed)
    with pk.patch_peft(original=folder):
        model, other = (peft.get_peft_model(each, lora()) for each in (packed, plain))
    for (_, one), (_, two) in zip(lora_layers(model), lora_layers(other), strict=True):
        assert torch.equal(codes(one.get_base_layer()), codes(two.get_base_layer()))
        assert one.get_base_layer().weight.quant_state.dtype == dtype


def test_copies_and_pickles(folder: Path, kind: str) -> None:
    model, _ = trained(folder, kind)
    after = logits(model)
    with pk.original_model(model):
        before = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), after)
        with pk.original_model(other):
            assert torch.equal(logits(other), before)


def test_conversion_to_a_plain_lora(folder: Path, tmp_path: Path) -> None:
    model, _ = trained(folder)
    model.save_pretrained(tmp_path / "trained")
    report = pk.convert_adapter(tmp_path / "trained", tmp_path / "trained", tmp_path / "plain")
    assert len(report.layers) == 7
    plain = peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "plain").train()
    for (_, one), (_, other) in zip(lora_layers(plain), lora_layers(model), strict=True):
        change = product(other) - s_initial(other)
        assert float((product(one) - change).norm()) < 1e-5 * float(product(other).norm())


def test_pefts_conversion_says_what_it_drops(folder: Path, tmp_path: Path) -> None:
    model = made(folder)
    pk.save_pissa(model, tmp_path / "residual")
    step(model)
    initial = tmp_path / "residual" / "pissa_init"
    with pytest.warns(
        UserWarning, match=r"quantized residuals \(nf4, blocks of 64.*7 layers.*drops .* = \d+\.?\d* over"
    ):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(initial))
    plain = peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "plain")
    for (_, one), (_, other) in zip(lora_layers(plain), lora_layers(model), strict=True):
        change = product(other) - s_initial(other)
        assert float((product(one) - change).norm()) < 1e-5 * float(product(other).norm())
