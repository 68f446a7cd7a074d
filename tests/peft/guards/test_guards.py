"""What PEFT's operations do to a model that was made under the hook, after the block has ended."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import pissa_kernels as pk
from pissa_kernels.peft.weights.record import records

from ...support.adapted import (
    DTYPES,
    allowed,
    assert_unchanged,
    beside,
    config,
    made,
    moved,
    no_svd,
    off,
    residuals,
    train,
    unchanged,
)
from ...support.changes import Expected, factors, layers
from ...support.models import build, output

LAYER = r"^layer 'model\.layers\.0\.self_attn\.q_proj'"


# Merging


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_merged_sets(name: str, safe: bool, dtype: torch.dtype) -> None:
    expected, adapted = made(name, dtype)
    kinds: dict[str, dict[str, Any]] = {"shared": {}, "other": {"r": 2}, "plain": {"init_lora_weights": True}}
    for adapter, changes in kinds.items():
        adapted.add_adapter(adapter, config(name, **changes))
        expected.made(adapted, adapter)
    train(adapted)
    bound = 2 * allowed(dtype) if dtype == torch.bfloat16 else 2e-6  # each merge rounds the weights
    before = residuals(adapted)
    for merged in (["default"], ["shared", "default"], ["other"], ["plain"], ["plain", "other", "default"]):
        adapted.merge_adapter(merged, safe_merge=safe)
        assert off(expected, adapted, *merged) <= bound, merged
        adapted.unmerge_adapter()
        assert off(expected, adapted, "default") <= bound, merged
        with pk.original_model(adapted):
            assert off(expected, adapted) <= bound, merged
    for key, weight in residuals(adapted).items():
        assert moved(before[key].double(), weight.double()) <= 4 * 2.0 * torch.finfo(dtype).eps


def test_adapters_merged_one_after_another() -> None:
    expected, adapted = made()
    beside(expected, adapted, "other", r=2)
    train(adapted)
    adapted.merge_adapter(["other"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.merge_adapter(["default"])
    assert off(expected, adapted, "other", "default") <= 2e-6
    adapted.set_adapter("default")  # PEFT unmerges
    assert off(expected, adapted, "default") <= 2e-6


def test_a_merged_adapter_whose_scale_has_changed_since() -> None:
    expected, adapted = made()
    train(adapted)
    adapted.merge_adapter()
    for layer in layers(adapted).values():
        layer.set_scale("default", 0.25)
    adapted.unmerge_adapter()
    assert off(expected, adapted, "default") <= 2e-6
    with pk.original_model(adapted):
        assert off(expected, adapted) <= 2e-6


def test_a_merge_with_another_scale_is_refused() -> None:
    expected, adapted = made()
    train(adapted)
    layer = layers(adapted)["model.layers.1.mlp.up_proj"]
    layer.set_scale("default", 0.5)
    before = unchanged(adapted)
    refusal = r"^layer 'model\.layers\.1\.mlp\.up_proj'.* scaling 0.5, but its initial factors were taken with 1"
    for operation in (adapted.merge_adapter, adapted.merge_and_unload, layer.merge):
        with pytest.raises(ValueError, match=refusal):
            operation()
        assert_unchanged(before, adapted)
    assert off(expected, adapted, "default") <= allowed(torch.float32)


def test_a_merge_that_fails_changes_nothing() -> None:
    expected, adapted = made()
    beside(expected, adapted, "other", r=2)
    train(adapted)
    layer = layers(adapted)["model.layers.0.self_attn.q_proj"]
    layer.lora_A["other"].weight.data[0, 0] = torch.nan
    before = unchanged(adapted)
    with pytest.raises(ValueError, match="NaNs detected"):
        adapted.merge_adapter(["default", "other"], safe_merge=True)
    assert_unchanged_but_nan(before, adapted)
    assert not layer.merged
    assert off(expected, adapted, "default") <= allowed(torch.float32)


def assert_unchanged_but_nan(before: dict[str, torch.Tensor], adapted: Any) -> None:
    for key, value in adapted.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[key].nan_to_num(7.0)), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_merges_are_still_recognized(dtype: torch.dtype) -> None:
    expected, adapted = made(dtype=dtype)
    train(adapted)
    for _ in range(20):
        adapted.merge_adapter()
        adapted.unmerge_adapter()
    adapted.add_adapter("shared", config("llama"))
    for layer in layers(adapted).values():
        assert records(layer)[1].lora_A is records(layer)[0].lora_A
    with pk.original_model(adapted):
        assert off(expected, adapted) <= 5 * allowed(dtype)


# Unloading and a new start


def test_unload_gives_the_original_model() -> None:
    expected, adapted = made()
    beside(expected, adapted, "other", r=2)
    train(adapted)
    base = adapted.unload()
    assert moved(output(expected.base), output(base)) <= allowed(torch.float32)
    assert not any(hasattr(module, "pissa_initial") for module in base.modules())
    with pk.patch_peft() as report:
        again = peft.get_peft_model(base, config("llama", r=3)).eval()
    assert {layer.rank for layer in report.layers} == {3}
    fresh = Expected(build("llama"))
    fresh.made(again)
    train(again)
    assert off(fresh, again, "default") <= 2 * allowed(torch.float32)


@pytest.mark.parametrize("active", [["default"], ["other"], ["plain"], ["default", "other"]])
def test_merge_and_unload(active: list[str]) -> None:
    expected, adapted = made()
    beside(expected, adapted, "other", r=2)
    beside(expected, adapted, "plain", init_lora_weights=True, target_modules=["q_proj"])
    train(adapted)
    wanted = expected.model(adapted, active)
    adapted.base_model.set_adapter(active)
    assert moved(output(wanted), output(adapted.merge_and_unload())) <= 2e-6


def recipe(rank: int = 4) -> tuple[Expected, Any, dict[str, Any]]:
    """PEFT's recipe: the config says init_lora_weights=True before the model is unloaded."""
    expected, adapted = made(r=rank)
    initial = factors(adapted, "default")
    adapted.peft_config["default"].init_lora_weights = True
    before = residuals(adapted)
    base = adapted.unload()
    for key, weight in before.items():
        assert torch.equal(base.get_submodule(key).weight, weight)
    return expected, base, initial


def test_the_recipe_keeps_the_residual_and_a_plain_adapter_on_it() -> None:
    expected, base, initial = recipe()
    plain = peft.get_peft_model(base, config("llama", init_lora_weights=True)).eval()
    for name, layer in layers(plain).items():
        layer.lora_A["default"].weight.data.copy_(initial[name][0])
        layer.lora_B["default"].weight.data.copy_(initial[name][1])
    assert moved(output(expected.base), output(plain)) <= allowed(torch.float32)


@pytest.mark.parametrize("rank", [4, 3])
def test_a_new_start_after_the_recipe(rank: int) -> None:
    expected, base, _ = recipe()
    with pk.patch_peft():
        again = peft.get_peft_model(base, config("llama", r=rank)).eval()
    expected.made(again)
    assert off(expected, again, "default") <= allowed(torch.float32)
    train(again)
    assert off(expected, again, "default") <= 2 * allowed(torch.float32)
    with pk.original_model(again):
        assert off(expected, again) <= 2 * allowed(torch.float32)
    W = build("llama").get_submodule("model.layers.0.self_attn.q_proj").weight.double()
    exact = torch.linalg.svdvals(W)[:rank]
    A0, B0 = expected.initial["default"]["model.layers.0.self_attn.q_proj"]
    found = torch.linalg.svdvals(float(layers(again)["model.layers.0.self_attn.q_proj"].scaling["default"]) * B0 @ A0)
    assert moved(exact, found[:rank]) <= 1e-5


def test_a_new_start_on_weights_that_were_loaded_again() -> None:
    expected, base, _ = recipe()
    base.load_state_dict(build("llama").state_dict())
    with pk.patch_peft():
        again = peft.get_peft_model(base, config("llama")).eval()
    assert off(expected.__class__(build("llama")), again) <= allowed(torch.float32)


def test_a_new_start_on_an_unknown_weight_is_refused() -> None:
    _, base, _ = recipe()
    base.get_submodule("model.layers.0.self_attn.q_proj").weight.data *= 1.5
    with pytest.raises(ValueError, match=LAYER + ".*no longer the one that PiSSA left"), pk.patch_peft():
        peft.get_peft_model(base, config("llama"))


@pytest.mark.parametrize("rank", [4, 3])
@pytest.mark.parametrize("same_name", [True, False])
def test_a_new_adapter_after_delete_adapter(rank: int, same_name: bool) -> None:
    expected, adapted = made()
    beside(expected, adapted, "plain", init_lora_weights=True)
    train(adapted)
    adapted.delete_adapter("default")
    assert off(expected, adapted, "plain") <= allowed(torch.float32)
    with pk.original_model(adapted):
        assert off(expected, adapted) <= allowed(torch.float32)
    name = "default" if same_name else "next"
    beside(expected, adapted, name, r=rank)
    assert all((record.adapter, record.shared) == (name, True) for layer in layers(adapted).values()
               for record in records(layer)[1:])  # fmt: skip
    train(adapted)
    for active in (name, "plain"):
        adapted.set_adapter(active)
        assert off(expected, adapted, active) <= 2 * allowed(torch.float32)


def test_the_last_adapter_deleted_and_a_new_start() -> None:
    expected, adapted = made()
    adapted.delete_adapter("default")
    assert moved(output(expected.base), output(adapted.base_model)) <= allowed(torch.float32)
    beside(expected, adapted, "next", r=3)
    assert all(len(records(layer)) == 1 and not records(layer)[0].shared for layer in layers(adapted).values())
    adapted.set_adapter("next")
    train(adapted)
    assert off(expected, adapted, "next") <= 2 * allowed(torch.float32)


# Refusals


@pytest.mark.parametrize("init", ["olora", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("way", ["add_adapter", "under the hook", "inject", "layer"])
def test_another_initializer_that_changes_the_base_is_refused(init: str, way: str) -> None:
    expected, adapted = made()
    train(adapted)
    before, names = unchanged(adapted), list(adapted.peft_config)
    settings = config("llama")
    settings.init_lora_weights = init  # type: ignore[assignment]

    def add() -> None:
        if way == "add_adapter":
            adapted.add_adapter("b", settings)
        elif way == "under the hook":
            with pk.patch_peft():
                adapted.add_adapter("b", settings)
        elif way == "inject":
            adapted.base_model.peft_config["b"] = settings
            try:
                adapted.base_model.inject_adapter(adapted.base_model.model, "b")
            finally:
                del adapted.base_model.peft_config["b"]
        else:
            layer = layers(adapted)["model.layers.0.self_attn.q_proj"]
            layer.update_layer("b", 4, lora_alpha=4, config=settings)

    with pytest.raises(ValueError, match=LAYER + f".*init '{init}' of the adapter 'b' changes the base weight"):
        add()
    assert list(adapted.peft_config) == names
    assert_unchanged(before, adapted)
    assert off(expected, adapted, "default") <= allowed(torch.float32)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_initializers_that_leave_the_base_are_accepted(init: Any) -> None:
    expected, adapted = made()
    adapted.add_adapter("b", config("llama", init_lora_weights=init))
    expected.initial["b"] = {
        name: (A, torch.zeros_like(B)) for name, (A, B) in factors(adapted, "b").items()
    }  # ΔW = s·B·A
    train(adapted)
    for active in ("default", "b"):
        adapted.set_adapter(active)
        assert off(expected, adapted, active) <= allowed(torch.float32)


def test_original_model_beside_another_initializer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = peft.get_peft_model(
            build("llama"), config("llama", init_lora_weights="olora", target_modules=["k_proj"])
        )
        with pk.patch_peft():
            first.add_adapter("b", config("llama", target_modules=["q_proj"]))
    refusal = r"^layer 'model\.layers\.0\.self_attn\.k_proj': the adapter 'default' \(init 'olora'\) has changed"
    with pytest.raises(ValueError, match=refusal), pk.original_model(first):
        pass


def test_original_model_beside_pissa_from_outside() -> None:
    first = peft.get_peft_model(build("llama"), config("llama", target_modules=["k_proj"]))
    with pk.patch_peft():
        first.add_adapter("b", config("llama", target_modules=["q_proj"]))
    refusal = r"^layer 'model\.layers\.0\.self_attn\.k_proj': the adapter 'default' \(init 'pissa'\)"
    with pytest.raises(ValueError, match=refusal), pk.original_model(first):
        pass


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_original_model_with_trained_biases(bias: str) -> None:
    _, adapted = made("gpt2", bias=bias)
    refusal = rf"^layer 'transformer\.h\.0\..*': the adapter 'default' trains its bias \(bias='{bias}'\)"
    with pytest.raises(ValueError, match=refusal), pk.original_model(adapted):
        pass


def perturb(adapted: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [1, 3]}},
        {"use_dora": True},
    ],
    ids=["modules_to_save", "tokens", "dora"],
)
def test_original_model_with_what_disabling_brings_back(changes: dict[str, Any]) -> None:
    expected, adapted = made(**changes)
    perturb(adapted)
    assert off(expected, adapted) > 3 * allowed(torch.float32)
    with pk.original_model(adapted):
        assert off(expected, adapted) <= allowed(torch.float32)


def test_original_model_with_a_trained_base_parameter() -> None:
    expected, adapted = made()
    norm = adapted.get_submodule("base_model.model.model.layers.1.input_layernorm")
    norm.weight.requires_grad_(True)
    refusal = r"^layer 'model\.layers\.1\.input_layernorm': its weight is trained"
    with pytest.raises(ValueError, match=refusal), pk.original_model(adapted):
        pass
    norm.weight.requires_grad_(False)
    with pk.original_model(adapted):
        assert off(expected, adapted) <= allowed(torch.float32)


def test_original_model_with_a_bias_of_the_adapter() -> None:
    expected, adapted = made("gpt2")
    adapted.add_adapter("b", config("gpt2", init_lora_weights=True, lora_bias=True))
    adapted.set_adapter("b")
    perturb(adapted)
    assert off(expected, adapted) > 3 * allowed(torch.float32)
    with pk.original_model(adapted):
        assert off(expected, adapted) <= allowed(torch.float32)


def test_a_weight_that_other_code_has_changed() -> None:
    _, adapted = made()
    layer = layers(adapted)["model.layers.0.self_attn.q_proj"]
    layer.get_base_layer().weight.data *= 1.2
    before = unchanged(adapted)
    refusal = LAYER + ".*no longer the one that PiSSA left here"
    for operation in (adapted.merge_adapter, adapted.unload, lambda: adapted.add_adapter("b", config("llama", r=2))):
        with pytest.raises(ValueError, match=refusal):
            operation()
        assert_unchanged(before, adapted)
    with pytest.raises(ValueError, match=refusal), pk.original_model(adapted):
        pass


def test_dora_beside_pissa() -> None:
    expected, adapted = made()
    before = unchanged(adapted)
    for changes in ({"use_dora": True, "init_lora_weights": True}, {"use_dora": True, "r": 2}):
        with pytest.raises(ValueError, match=LAYER + r".*'b' \(Dora\) computes with the stored weight"):
            adapted.add_adapter("b", config("llama", **changes))
        assert_unchanged(before, adapted)
    assert off(expected, adapted, "default") <= allowed(torch.float32)


def test_an_addition_that_fails_half_way_gives_the_weights_back() -> None:
    expected, adapted = made(target_modules=["v_proj"], rank_pattern={r"layers\.1.*v_proj": 2})
    before = residuals(adapted)
    settings = config("llama", use_dora=True, target_modules=["q_proj", "v_proj"])  # shares layer 0, differs in layer 1
    with pytest.raises(ValueError, match=r"^layer 'model\.layers\.1\.self_attn\.v_proj'.*'b' \(Dora\)"):
        adapted.add_adapter("b", settings)
    assert off(expected, adapted, "default") <= allowed(torch.float32)
    for name, layer in layers(adapted).items():
        W = expected.base.get_submodule(name).weight
        wanted = before[name].double() if name in before else W
        assert moved(wanted, layer.get_base_layer().weight.double()) <= 1e-6
        assert "b" not in layer.lora_A
    train(adapted)
    adapted.merge_adapter()
    with pytest.raises(ValueError, match=r"^layer .*: the adapter 'default' is merged; call unmerge_adapter\(\) first"):
        adapted.add_adapter("b", settings)
    assert off(expected, adapted, "default") <= 2e-6


def test_dora_with_a_shared_start() -> None:
    """TRL's reference copies the config, DoRA included."""
    base = build("llama")
    _, adapted = made(use_dora=True)
    adapted.add_adapter("reference", config("llama", use_dora=True))
    perturb(adapted)
    trained = output(adapted)
    adapted.set_adapter("reference")
    assert moved(output(base), output(adapted)) <= allowed(torch.float32)
    adapted.set_adapter("default")
    assert torch.equal(trained, output(adapted))
    adapted.merge_adapter()
    assert moved(trained, output(adapted)) <= 2e-6
    adapted.unmerge_adapter()
    before = unchanged(adapted)
    with pytest.raises(ValueError, match=LAYER + r".*\(Dora\) .*cannot be merged here"):
        adapted.merge_adapter(["default", "reference"])
    assert_unchanged(before, adapted)
    adapted.base_model.set_adapter(["default", "reference"])
    with pytest.raises(ValueError, match=LAYER + r".*\(Dora\) computes with the stored weight"):
        output(adapted)
    adapted.base_model.set_adapter(["default"])
    assert moved(trained, output(adapted)) <= 2e-6


@pytest.mark.parametrize("rank", [4, 2])
def test_a_new_adapter_on_a_merged_model(rank: int) -> None:
    """PEFT unmerges the model while it adds the adapter."""
    expected, adapted = made()
    train(adapted)
    adapted.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        beside(expected, adapted, "b", r=rank)
    assert not any(layer.merged for layer in layers(adapted).values())
    for active in ("default", "b"):
        adapted.set_adapter(active)
        assert off(expected, adapted, active) <= 2e-6


def test_a_layer_that_is_merged_is_not_initialized() -> None:
    _, adapted = made()
    layer = layers(adapted)["model.layers.0.self_attn.q_proj"]
    layer.merge()
    with pytest.raises(ValueError, match=r"'default' is merged into the weight; call unmerge_adapter\(\) first"):
        layer.update_layer("b", 4, lora_alpha=4, config=config("llama"))


# The seed, layers that are new, and models without a PeftModel


def test_the_seed_of_the_patch_is_the_models() -> None:
    net = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 96))
    with pk.patch_peft(seed=5):
        adapted = peft.get_peft_model(net, config("llama", target_modules=["0"], init_lora_weights="pissa_niter_1"))
    adapted.add_adapter("b", config("llama", target_modules=["0", "1"], init_lora_weights="pissa_niter_1"))
    first, second = layers(adapted)["0"], layers(adapted)["1"]
    assert [record.report.seed for record in records(first)] == [5, 5]
    assert records(first)[1].lora_A is records(first)[0].lora_A
    assert [record.report.seed for record in records(second)] == [5]


def test_a_layer_that_only_the_second_adapter_has() -> None:
    expected, adapted = made(target_modules=["q_proj"])
    adapted.add_adapter("b", config("llama", target_modules=["q_proj", "v_proj"]))
    expected.made(adapted, "b")
    train(adapted)
    for active in (["default"], ["b"], ["default", "b"]):
        adapted.base_model.set_adapter(active)
        assert off(expected, adapted, *active) <= allowed(torch.float32)
    adapted.base_model.set_adapter(["default"])
    adapted.merge_adapter()
    assert off(expected, adapted, "default") <= 2e-6
    adapted.unmerge_adapter()
    assert moved(output(expected.base), output(adapted.unload())) <= 2e-6


@pytest.mark.parametrize("way", ["inject_adapter_in_model", "add_adapter"])
def test_a_transformers_model_without_a_peft_model(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    base = build("llama")
    expected = Expected(base)
    with pk.patch_peft():
        if way == "add_adapter":
            base.add_adapter(config("llama"), adapter_name="default")
        else:
            peft.inject_adapter_in_model(config("llama"), base)
    expected.made(base, "default")
    base.eval()
    if way == "add_adapter":
        base.add_adapter(config("llama", r=2), adapter_name="b")
    else:
        peft.inject_adapter_in_model(config("llama", r=2), base, adapter_name="b")
    expected.made(base, "b")
    train(base)
    for layer in layers(base).values():
        layer.set_adapter("b")
    assert off(expected, base, "b") <= allowed(torch.float32)
    grads = [parameter.requires_grad for parameter in base.parameters()]
    with pk.original_model(base):
        assert off(expected, base) <= allowed(torch.float32)
    assert grads == [parameter.requires_grad for parameter in base.parameters()]
    assert off(expected, base, "b") <= allowed(torch.float32)
    before, olora = unchanged(base), config("llama", init_lora_weights="olora")
    add = (
        base.add_adapter if way == "add_adapter" else lambda *args: peft.inject_adapter_in_model(args[0], base, args[1])
    )
    with pytest.raises(ValueError, match=LAYER + ".*changes the base weight"):
        add(olora, "c")
    assert_unchanged(before, base)


def test_transformers_load_adapter_takes_the_saved_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    expected, adapted = made(init_lora_weights="pissa_niter_1")
    train(adapted)
    adapted.save_pretrained(tmp_path)
    no_svd(monkeypatch)
    base = build("llama")
    with pk.patch_peft(seed=7):
        base.load_adapter(str(tmp_path))
    assert moved(output(adapted), output(base)) <= allowed(torch.float32)
    base.load_adapter(str(tmp_path), adapter_name="again")  # after the block
    for layer in layers(base).values():
        layer.set_adapter("again")
    assert moved(output(adapted), output(base)) <= allowed(torch.float32)
    with pk.original_model(base):
        assert off(expected, base) <= allowed(torch.float32)
    other = build("llama")
    other.model.layers[0].self_attn.q_proj.weight.data *= 1.2
    with pytest.raises(ValueError, match=LAYER + ".*the weight is not the one"), pk.patch_peft():
        other.load_adapter(str(tmp_path))


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa_niter_1"}, {"init_lora_weights": True}])
def test_transformers_hotswap_takes_the_initial_factors(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    expected, adapted = made(**changes)
    train(adapted)
    adapted.save_pretrained(tmp_path)
    base = build("llama")
    with pk.patch_peft():
        base.add_adapter(config("llama"), "default")
    base.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)  # after the block
    assert moved(output(adapted), output(base)) <= allowed(torch.float32)
    with pk.original_model(base):
        assert off(expected, base) <= allowed(torch.float32)


def test_a_method_of_a_model_that_is_gone(tmp_path: Path) -> None:
    save, merge = made()[1].save_pretrained, made()[1].base_model.merge_adapter
    gc.collect()
    for method in (lambda: save(tmp_path / "out"), merge):
        with pytest.raises(ReferenceError, match="keep it in a variable during the call"):
            method()
    assert not list(tmp_path.iterdir())


def test_a_wrapped_copy_of_the_base_model() -> None:
    """get_peft_model on a base model whose layers are adapted already."""
    expected, adapted = made()
    train(adapted)
    inner = adapted.get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = peft.get_peft_model(inner, config("llama", r=2), adapter_name="b").eval()
    expected.made(second, "b")
    for active in (["b"], ["default"]):
        for layer in layers(second).values():
            layer.set_adapter(active)
        assert off(expected, second, *active) <= allowed(torch.float32)


def test_the_copy_of_a_model_guards_its_own_layers() -> None:
    expected, adapted = made()
    other = copy.deepcopy(adapted)
    other.merge_adapter()
    assert not any(layer.merged for layer in layers(adapted).values())
    assert all(layer.merged for layer in layers(other).values())
    assert off(expected, other, "default") <= 2e-6
