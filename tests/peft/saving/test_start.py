"""``save_pissa`` after training: all that PEFT trains has its initial values, and the base model all its tensors."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import pissa_kernels as pk
from pissa_kernels.peft.saving.start import adapter_state

from ...support.adapted import allowed, config, lora_layers, moved
from ...support.models import build, output
from ...support.trained import SETTINGS, VARIANTS, stored, trained


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(("dtype", "adapter_name"), VARIANTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_initial_state_of_a_trained_model(
    setting: str, dtype: torch.dtype, adapter_name: str, tmp_path: Path
) -> None:
    name, changes = SETTINGS[setting]
    base = stored(build(name, dtype), tmp_path / "base")
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base), config(name, **changes), adapter_name=adapter_name).eval()
    before = {key: value.clone() for key, value in adapter_state(model, adapter_name).items()}
    start = output(model)
    after = {key: value.clone() for key, value in trained(model).state_dict().items()}
    assert moved(output(base), output(model)) > 3 * allowed(dtype)
    pk.save_pissa(model, tmp_path / "out", adapter_name=adapter_name)
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
    residual = type(base).from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert shapes(residual.state_dict()) == shapes(base.state_dict())
    layers = lora_layers(model).items()
    adapted = {f"{layer}.weight" for layer, module in layers if module.lora_A or module.lora_embedding_A}
    for key, value in residual.state_dict().items():
        assert key in adapted or torch.equal(value, base.state_dict()[key]), key
    saved = load_file(tmp_path / "out" / "pissa_init" / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.") for key in saved} == set(before)
    assert all(torch.equal(value, before[key.removeprefix("base_model.model.")]) for key, value in saved.items())
    loaded = peft.PeftModel.from_pretrained(residual, tmp_path / "out", subfolder="pissa_init").eval()
    assert torch.equal(output(loaded), start)
    assert moved(output(base), output(loaded)) <= allowed(dtype)


def saved_and_loaded(model: Any, folder: Path, adapter_name: str = "default") -> Any:
    """What stock transformers and PEFT make of the saved initial state."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    pk.save_pissa(model, folder, adapter_name=adapter_name)
    residual = type(base).from_pretrained(folder).eval()
    return peft.PeftModel.from_pretrained(residual, folder, subfolder="pissa_init").eval()


def made(name: str, **changes: Any) -> tuple[Any, Any]:
    base = build(name)
    with pk.patch_peft():
        return base, peft.get_peft_model(copy.deepcopy(base), config(name, **changes)).eval()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_know_the_start(way: Any, tmp_path: Path) -> None:
    base, model = made("gpt2", bias="all", use_dora=True, trainable_token_indices=[1])
    loaded = saved_and_loaded(way(trained(model)), tmp_path / "out")
    assert moved(output(base), output(loaded)) <= allowed(torch.float32)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_start_of_a_reloaded_adapter(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    base, model = made("gpt2", bias="all", use_dora=True, trainable_token_indices=[1])
    trained(model).save_pretrained(tmp_path / "trained")
    with pk.patch_peft():
        again = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / "trained", low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
    assert torch.equal(output(again), output(model))
    loaded = saved_and_loaded(again, tmp_path / "out")
    assert moved(output(base), output(loaded)) <= allowed(torch.float32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {}),
        ({}, {"r": 2, "target_modules": ["c_attn"]}),
        ({"trainable_token_indices": [1], "use_dora": True}, {"r": 2}),
        ({"bias": "all"}, {"lora_alpha": 9, "modules_to_save": ["lm_head"]}),
    ],
    ids=["same", "other rank and layers", "tokens and dora", "biases"],
)
def test_each_of_two_adapters_is_saved_with_its_own_residual(
    one: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    base, model = made("gpt2", **one)
    trained(model)
    with pk.patch_peft():
        model.add_adapter("other", config("gpt2", **other))
    model.set_adapter("other")
    trained(model)
    for name in ("default", "other"):
        loaded = saved_and_loaded(model, tmp_path / name, name)
        assert moved(output(base), output(loaded)) <= 2 * allowed(torch.float32)


def test_a_model_of_transformers_with_an_adapter_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers asks for a later PEFT than it needs here
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    base = build("gpt2")
    model = copy.deepcopy(base)
    with pk.patch_peft():
        model.add_adapter(config("gpt2", bias="all", use_dora=True), "first")
    trained(model.eval())
    before = output(model)
    loaded = saved_and_loaded(model, tmp_path / "out", "first")
    assert moved(output(base), before) > 3 * allowed(torch.float32)
    assert torch.equal(output(model), before)
    assert moved(output(base), output(loaded)) <= allowed(torch.float32)


def test_a_module_that_is_not_of_transformers(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(20, 16)
            self.body = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16))
            self.norm = torch.nn.BatchNorm1d(16)
            self.head = torch.nn.Linear(16, 20)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.body(self.embed(ids))))  # type: ignore[no-any-return]

    base = Tied().eval()
    ids = torch.arange(20)
    settings = peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["body.0"], modules_to_save=["norm"], bias="all"
    )
    with pk.patch_peft():
        model = trained(peft.get_peft_model(copy.deepcopy(base), settings).eval())
    pk.save_pissa(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert shapes(saved) == shapes(base.state_dict())
    residual = copy.deepcopy(base)
    residual.load_state_dict(saved)
    loaded = peft.PeftModel.from_pretrained(residual, tmp_path / "out" / "pissa_init").eval()
    assert moved(base(ids), model(ids)) > 1e-2
    assert moved(base(ids), loaded(ids)) <= 1e-5


# What cannot be known


def without_values(model: Any) -> Any:
    """As a model that was pickled by version 0.1.0."""
    del model.get_base_model().__dict__["pissa_start"]
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_magnitudes_are_computed_again(name: str, tmp_path: Path) -> None:
    """To the bit, where PEFT took them from W_res + s·B₀·A₀ and not from W, as version 0.1.0 let it."""
    base = build(name)
    with pk.patch_peft(batch=False):
        model = peft.get_peft_model(
            copy.deepcopy(base), config(name, use_dora=True, modules_to_save=["lm_head"])
        ).eval()
    before = {key: value.clone() for key, value in adapter_state(model, "default").items()}
    loaded = saved_and_loaded(without_values(trained(model)), tmp_path / "out")
    state = adapter_state(loaded, "default")
    for key, value in before.items():
        # PEFT may have computed it from W itself
        bound = 4 * 2**-24 if "magnitude" in key else 0
        assert moved(value.double(), state[key].double()) <= bound, key
    assert moved(output(base), output(loaded)) <= allowed(torch.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"bias": "all"},
            r"'transformer\.h\.0\.ln_1\.bias', which the adapter 'default' trains, is not known any more",
        ),
        ({"bias": "lora_only"}, r"'transformer\.h\.0\.attn\.c_attn\.base_layer\.bias', which .* is not known any more"),
    ],
)
def test_an_unknown_initial_value_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    _, model = made("gpt2", **changes)
    with pytest.raises(ValueError, match=words) as caught:
        pk.save_pissa(without_values(model), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_base_model_that_is_trained_is_refused(tmp_path: Path) -> None:
    base, model = made("llama", bias="all")
    norm = model.get_base_model().model.norm
    norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^'model\.norm\.weight' of the base model is trained, .*grad_\(False\)"):
        pk.save_pissa(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    norm.requires_grad_(False)
    loaded = saved_and_loaded(model, tmp_path / "out")
    assert moved(output(base), output(loaded)) <= allowed(torch.float32)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_weight_that_is_not_the_residual_is_refused(name: str, tmp_path: Path) -> None:
    _, model = made(name)
    layer, module = next(iter(lora_layers(model).items()))
    module.get_base_layer().weight.data *= 1.01
    with pytest.raises(ValueError, match=re.escape(layer)):
        pk.save_pissa(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_that_saves_only_its_own_tensors_is_refused(tmp_path: Path) -> None:
    """As diffusers' models, which accept any keyword."""

    class Own(torch.nn.Sequential):
        def save_pretrained(self, folder: Path, **kwargs: Any) -> None:
            raise AssertionError("called")

    settings = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["0"])
    with pk.patch_peft():
        model = peft.get_peft_model(Own(torch.nn.Linear(16, 16)), settings)
    with pytest.raises(ValueError, match="save_pretrained of Own takes no state_dict"):
        pk.save_pissa(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_compiled_model_is_saved(tmp_path: Path) -> None:
    base, model = made("llama", use_dora=True)
    compiled = torch.compile(trained(model), backend="eager")
    pk.save_pissa(compiled, tmp_path / "out")
    residual = type(base).from_pretrained(tmp_path / "out").eval()
    loaded = peft.PeftModel.from_pretrained(residual, tmp_path / "out", subfolder="pissa_init").eval()
    assert moved(output(base), output(loaded)) <= allowed(torch.float32)
    report = pk.Report.read(tmp_path / "out" / "pissa_init" / "pissa_report.json")
    assert {layer.name for layer in report.layers} == set(lora_layers(model))


def test_biases_of_another_adapter_are_refused_too(tmp_path: Path) -> None:
    _, model = made("gpt2", bias="all")
    with pk.patch_peft():
        model.add_adapter("other", config("gpt2"))
    with pytest.raises(ValueError, match=r"'default' trains biases .* not known any more"):
        pk.save_pissa(without_values(model), tmp_path / "out", adapter_name="other")
    assert not list(tmp_path.iterdir())


def test_a_base_model_changed_since_is_refused(tmp_path: Path) -> None:
    _, model = made("llama")
    model.get_base_model().resize_token_embeddings(104)
    words = r"'model\.embed_tokens\.weight' with shape \(100, 96\) before PEFT changed it, .* \(104, 96\) now"
    with pytest.raises(ValueError, match=words):
        pk.save_pissa(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", ["layers", "copy"])
def test_lora_inside_a_module_that_another_adapter_copies_is_refused(first: str, tmp_path: Path) -> None:
    """PEFT saves such an adapter without these layers, or not at all."""
    torch.manual_seed(0)
    small = transformers.RobertaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, num_labels=3
    )
    layers = peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["query", "dense"])
    copied = peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["query"], modules_to_save=["classifier"])
    pair = (layers, copied) if first == "layers" else (copied, layers)
    with pk.patch_peft():
        model = peft.get_peft_model(transformers.RobertaForSequenceClassification(small), pair[0])
        model.add_adapter("other", pair[1])
    for name in ("default", "other"):
        if (name == "default") == (first == "copy"):
            continue
        with pytest.raises(ValueError, match=r"PEFT (does not|cannot) save .*classifier"):
            pk.save_pissa(model, tmp_path / "out", adapter_name=name)
    assert not list(tmp_path.iterdir())
