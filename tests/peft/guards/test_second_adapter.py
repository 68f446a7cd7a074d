"""Adapters that come to a model with residuals: loaded, loaded over another one, swapped, and combined."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import pissa_kernels as pk
from pissa_kernels.numerics import UNIT_ROUNDOFF
from pissa_kernels.peft.layers import batches
from pissa_kernels.peft.layers.initialize import prepare
from pissa_kernels.peft.saving import sidecar
from pissa_kernels.peft.weights.record import ROUNDINGS, fingerprint, matches, of_adapter, records

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
    train,
    unchanged,
)
from ...support.changes import Expected, layers
from ...support.jobs import CPU, mixed_net, run
from ...support.models import build, output
from ...support.reference import realistic

LAYER = r"^layer 'model\.layers\.0\.self_attn\.q_proj'"
OTHER: dict[str, dict[str, Any]] = {
    "rank": {"r": 2, "lora_alpha": 5},
    "sketch": {"init_lora_weights": "pissa_niter_1"},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "layers": {"target_modules": ["v_proj", "up_proj"]},
}


def saved(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.Tensor:
    """Save a trained adapter; its output."""
    base = build("llama", dtype)
    with pk.patch_peft(seed=seed):
        adapted = peft.get_peft_model(base, config("llama", **changes)).eval()
    train(adapted)
    adapted.save_pretrained(folder)
    return output(adapted)


# Loaded beside


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("kind", OTHER)
def test_a_trained_adapter_beside_another_one(kind: str, within: bool, tmp_path: Path) -> None:
    alone = saved(tmp_path, seed=3, **OTHER[kind])
    expected, adapted = made()
    train(adapted)
    first = output(adapted)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(adapted).items()}
    if within:
        with pk.patch_peft():
            adapted.load_adapter(tmp_path, "b")
    else:
        adapted.load_adapter(tmp_path, "b")
    assert all(torch.equal(before[name], layer.get_base_layer().weight) for name, layer in layers(adapted).items())
    assert torch.equal(first, output(adapted))
    adapted.set_adapter("b")
    assert moved(alone, output(adapted)) <= allowed(torch.float32)
    adapted.save_pretrained(tmp_path / "again")
    with pk.patch_peft():
        again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "again" / "b").eval()
    assert moved(alone, output(again)) <= allowed(torch.float32)
    del expected


def test_a_trained_adapter_by_way_of_the_meta_device(tmp_path: Path) -> None:
    alone = saved(tmp_path, **OTHER["rank"])
    _, adapted = made()
    adapted.load_adapter(tmp_path, "b", low_cpu_mem_usage=True)
    adapted.set_adapter("b")
    assert moved(alone, output(adapted)) <= allowed(torch.float32)


def test_the_same_factors_are_shared_without_an_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = saved(tmp_path)
    _, adapted = made()
    no_svd(monkeypatch)
    adapted.load_adapter(tmp_path, "b")
    assert all(of_adapter(layer, "b").lora_A is records(layer)[0].lora_A for layer in layers(adapted).values())
    adapted.set_adapter("b")
    assert torch.equal(alone, output(adapted))


def test_an_adapter_of_another_base_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = build("llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj.weight.data *= 1.3
    with pk.patch_peft():
        changed = peft.get_peft_model(base, config("llama", r=2))
    changed.save_pretrained(tmp_path)
    expected, adapted = made()
    before = unchanged(adapted)
    with pytest.raises(ValueError, match=r"^layer 'model\.layers\.\d\.self_attn\.q_proj'.*the weight is not the one"):
        adapted.load_adapter(tmp_path, "b")
    assert_unchanged(before, adapted)
    assert list(adapted.peft_config) == ["default"]
    assert off(expected, adapted, "default") <= allowed(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    expected, adapted = made(dtype=dtype)
    beside(expected, adapted, "b", r=2)
    train(adapted)
    for active in (["default"], ["b"], ["b", "default"]):
        adapted.base_model.set_adapter(active)
        assert off(expected, adapted, *active) <= allowed(dtype if dtype == torch.float32 else torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_adapters_of_layers_that_form_batches(dtype: torch.dtype) -> None:
    """As on a GPU: the weights with a subtraction are decomposed one by one, and stay as they are."""
    net = mixed_net(dtype)
    expected = Expected(net)
    adapted = peft.get_peft_model(net, config("llama", init_lora_weights=True, target_modules=list("012345")))
    for adapter, rank in (("default", 4), ("shared", 4), ("other", 2)):
        if adapter != "default":
            settings = config("llama", r=rank, init_lora_weights=True, target_modules=list("012345"))
            adapted.add_adapter(adapter, settings)
        before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(adapted).items()}
        found = [prepare(layer, adapter, "pissa", name=name) for name, layer in layers(adapted).items()]
        jobs = [job for job in found if job is not None]
        emitted: list[str | None] = []
        run(batches.plan_batches(jobs, CPU, 1 << 30), "resident", lambda job, _: emitted.append(job.name))  # noqa: B023
        assert sorted(emitted, key=str) == list("012345")
        same = [torch.equal(before[name], layer.get_base_layer().weight) for name, layer in layers(adapted).items()]
        assert all(same) == (adapter != "default")
        expected.made(adapted, adapter)
    train(adapted)
    for active in (["default"], ["shared"], ["other"], ["other", "default"]):
        adapted.base_model.set_adapter(active)
        exact = expected.model(adapted, active)
        for name, layer in layers(adapted).items():
            x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
            wanted = exact.get_submodule(name)(x.double())
            own = moved(wanted, exact.get_submodule(name).to(dtype)(x).double())  # of the dtype's arithmetic
            assert moved(wanted, layer(x).double()) <= 4 * own, (active, name)


# Loaded over


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_loaded_after_merges(dtype: torch.dtype, tmp_path: Path) -> None:
    alone = saved(tmp_path, dtype=dtype)
    _, adapted = made(dtype=dtype)
    for _ in range(5):
        adapted.merge_adapter()
        adapted.unmerge_adapter()
    adapted.load_adapter(tmp_path, "default")
    assert moved(alone, output(adapted)) <= 4 * allowed(dtype)
    assert all(len(records(layer)) == 1 for layer in layers(adapted).values())


def test_values_of_other_factors_of_the_same_weight(tmp_path: Path) -> None:
    """A resume on another backend: the factors differ in their last bits, or, as here, by the sketch."""
    alone = saved(tmp_path, seed=3, init_lora_weights="pissa_niter_1")
    expected, adapted = made()
    train(adapted)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(adapted).items()}
    adapted.load_adapter(tmp_path, "default")
    assert all(torch.equal(before[name], layer.get_base_layer().weight) for name, layer in layers(adapted).items())
    assert moved(alone, output(adapted)) <= allowed(torch.float32)
    with pk.original_model(adapted):
        assert off(expected, adapted) <= allowed(torch.float32)
    adapted.merge_adapter()
    assert moved(alone, output(adapted)) <= 2e-6
    adapted.unmerge_adapter()
    adapted.save_pretrained(tmp_path / "again")
    with pk.patch_peft():
        again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "again").eval()
    assert moved(alone, output(again)) <= allowed(torch.float32)


def test_values_of_a_plain_adapter(tmp_path: Path) -> None:
    plain = peft.get_peft_model(build("llama"), config("llama", init_lora_weights=True)).eval()
    train(plain)
    plain.save_pretrained(tmp_path)
    expected, adapted = made()
    adapted.load_adapter(tmp_path, "default")
    assert moved(output(plain), output(adapted)) <= allowed(torch.float32)
    with pk.original_model(adapted):
        assert off(expected, adapted) <= allowed(torch.float32)
    adapted.save_pretrained(tmp_path / "again")
    with pk.patch_peft():
        again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "again").eval()
    assert moved(output(plain), output(again)) <= allowed(torch.float32)


def test_values_of_pissa_for_a_plain_adapter(tmp_path: Path) -> None:
    alone = saved(tmp_path, **OTHER["sketch"])
    expected, adapted = made()
    beside(expected, adapted, "plain", init_lora_weights=True)
    adapted.load_adapter(tmp_path, "plain")
    adapted.set_adapter("plain")
    assert moved(alone, output(adapted)) <= allowed(torch.float32)
    adapted.save_pretrained(tmp_path / "again")
    with pk.patch_peft():
        again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "again" / "plain").eval()
    assert moved(alone, output(again)) <= allowed(torch.float32)


def test_values_for_a_merged_adapter_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    _, adapted = made()
    adapted.merge_adapter()
    before = unchanged(adapted)
    with pytest.raises(ValueError, match=LAYER + ".*'default' is merged; unmerge it before the load"):
        adapted.load_adapter(tmp_path, "default")
    assert_unchanged(before, adapted)


# Recognition


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_a_weight_is_recognized_after_many_roundings(dtype: torch.dtype) -> None:
    W = realistic(96, 64).to(dtype)
    weight, generator = W.clone(), torch.Generator().manual_seed(0)
    for _ in range(50):  # merged and unmerged
        change = (0.3 * W.float().std() * torch.randn(W.shape, generator=generator)).to(dtype)
        weight += change
        weight -= change
    assert not torch.equal(weight, W)
    assert matches(fingerprint(W), fingerprint(weight), [dtype])


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_a_residual_is_not_taken_for_its_weight(dtype: torch.dtype, rank: int) -> None:
    W = realistic(96, 64).to(dtype)
    residual = pk.decompose(W, rank).residual
    assert not matches(fingerprint(W), fingerprint(residual), [dtype], other=fingerprint(residual))
    assert not matches(fingerprint(residual), fingerprint(W), [dtype], other=fingerprint(W))
    assert matches(fingerprint(W), fingerprint(W.float()), [dtype, torch.float32], other=fingerprint(residual))


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_the_bound_is_a_number_of_roundings(dtype: torch.dtype) -> None:
    """Both sides of it, for a weight that is off by a multiple of u·rms(W) everywhere."""
    W = realistic(96, 64)
    unit = UNIT_ROUNDOFF[dtype] * fingerprint(W).double().square().mean().sqrt()
    assert matches(fingerprint(W), fingerprint(W).double() + 0.99 * ROUNDINGS * unit, [dtype])
    assert not matches(fingerprint(W), fingerprint(W).double() + 1.01 * ROUNDINGS * unit, [dtype])
    assert not matches(fingerprint(W), fingerprint(W) * torch.nan, [dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_residual_of_an_unseeded_sketch_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """Plain PEFT's pissa_niter_N draws its sketch from the global generator."""
    saved(tmp_path, dtype=dtype, init_lora_weights="pissa_niter_1")
    torch.manual_seed(11)
    stock = peft.get_peft_model(build("llama", dtype), config("llama", init_lora_weights="pissa_niter_1"))
    before = unchanged(stock)
    with pytest.raises(ValueError, match="the weight is not the residual that the adapter"), pk.patch_peft():
        stock.load_adapter(tmp_path, "default")
    assert_unchanged(before, stock)


# Swapped


def swap(adapted: Any, folder: Path) -> None:
    with pk.patch_peft():
        hotswap_adapter(adapted, str(folder), "default", torch_device="cpu")


@pytest.mark.parametrize("kind", ["same", "rank", "sketch", "plain"])
def test_hotswap(kind: str, tmp_path: Path) -> None:
    changes = {"same": {}, "plain": {"init_lora_weights": True}} | OTHER
    if kind == "plain":
        plain = peft.get_peft_model(build("llama"), config("llama", **changes[kind])).eval()
        train(plain)
        plain.save_pretrained(tmp_path)
        alone = output(plain)
    else:
        alone = saved(tmp_path, seed=3, **changes[kind])
    expected, adapted = made()
    train(adapted)
    swap(adapted, tmp_path)
    assert moved(alone, output(adapted)) <= allowed(torch.float32)
    with pk.original_model(adapted):
        assert off(expected, adapted) <= allowed(torch.float32)


@pytest.mark.slow
def test_hotswap_of_a_compiled_model(tmp_path: Path) -> None:
    torch.compiler.reset()
    alone = saved(tmp_path, seed=3, **OTHER["rank"])
    expected, adapted = made()
    prepare_model_for_compiled_hotswap(adapted, target_rank=4)
    compiled = torch.compile(adapted, backend="eager")
    assert off(expected, compiled) <= allowed(torch.float32)
    swap(compiled, tmp_path)
    assert moved(alone, output(compiled)) <= allowed(torch.float32)


def test_hotswap_without_initial_factors_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, **OTHER["rank"])
    (tmp_path / sidecar.INITIAL_NAME).unlink()
    _, adapted = made()
    before = unchanged(adapted)
    with pytest.raises(ValueError, match=LAYER + ".*the values to swap in come without initial factors"):
        swap(adapted, tmp_path)
    assert_unchanged(before, adapted)


# Combined


def combined(kind: str, weights: list[float], **more: Any) -> tuple[Expected, Any, dict[str, float]]:
    expected, adapted = made()
    beside(expected, adapted, "shared")
    beside(expected, adapted, "other", r=2, lora_alpha=6)
    beside(expected, adapted, "plain", init_lora_weights=True)
    names = ["default", "shared", "other", "plain"][: len(weights)]
    train(adapted)
    wanted = dict(zip(names, weights, strict=True))
    adapted.add_weighted_adapter(names, weights, "sum", combination_type=kind, **more)
    adapted.set_adapter("sum")
    return expected, adapted, wanted


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5, 2.0], [0.5, 0.25, 0.25, 1.0], [0.6]])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_weighted_adapters(kind: str, weights: list[float], tmp_path: Path) -> None:
    more = {"svd_rank": 14} if kind == "svd" else {}
    expected, adapted, wanted = combined(kind, weights, **more)
    exact = output(expected.model(adapted, wanted))
    assert moved(exact, output(adapted)) <= 2 * allowed(torch.float32)
    with pk.original_model(adapted):
        assert off(expected, adapted) <= allowed(torch.float32)
    assert adapted.peft_config["default"].init_lora_weights == "pissa"
    adapted.save_pretrained(tmp_path)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "sum").eval()
    assert moved(exact, output(loaded)) <= 2 * allowed(torch.float32)
    adapted.merge_adapter()
    assert moved(exact, output(adapted)) <= 4e-6


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_untrained_adapters_combine_to_the_original(kind: str) -> None:
    expected, adapted = made()
    beside(expected, adapted, "shared")
    beside(expected, adapted, "other", r=2)
    more = {} if kind in ("cat", "svd") else {"density": 0.5}
    adapted.add_weighted_adapter(["default", "shared", "other"], [0.2, 0.5, 0.4], "sum", combination_type=kind, **more)
    adapted.set_adapter("sum")
    assert off(expected, adapted) <= allowed(torch.float32)


def test_combinations_of_changes() -> None:
    """With density 1 nothing is pruned, and a full rank loses nothing."""
    expected, adapted, wanted = combined("magnitude_prune_svd", [0.7, 0.3], density=1.0, svd_rank=16)
    assert moved(output(expected.model(adapted, wanted)), output(adapted)) <= 4 * allowed(torch.float32)


@pytest.mark.parametrize("kind", ["cat", "magnitude_prune_svd"])
def test_a_combination_of_layers_of_several_ranks(kind: str, tmp_path: Path) -> None:
    expected, adapted = made(rank_pattern={"q_proj": 1})
    train(adapted)
    more = {} if kind == "cat" else {"density": 1.0, "svd_rank": 8}
    adapted.add_weighted_adapter(["default"], [0.5], "sum", combination_type=kind, **more)
    adapted.set_adapter("sum")
    exact = output(expected.model(adapted, {"default": 0.5}))
    assert moved(exact, output(adapted)) <= 2 * allowed(torch.float32)
    adapted.save_pretrained(tmp_path)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "sum").eval()
    assert moved(exact, output(loaded)) <= 2 * allowed(torch.float32)


@pytest.mark.parametrize("kind", ["cat", "magnitude_prune_svd"])
def test_combinations_in_a_merged_model(kind: str) -> None:
    """PEFT unmerges it."""
    expected, adapted = made()
    beside(expected, adapted, "other", r=2)
    train(adapted)
    adapted.merge_adapter()
    more = {} if kind == "cat" else {"density": 1.0, "svd_rank": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", combination_type=kind, **more)
    assert off(expected, adapted, "default") <= 2e-6
    adapted.set_adapter("sum")
    exact = output(expected.model(adapted, {"default": 0.5, "other": 2.0}))
    assert moved(exact, output(adapted)) <= 4e-6


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_combinations_of_factors_are_refused(kind: str) -> None:
    expected, adapted = made()
    beside(expected, adapted, "shared")
    before = unchanged(adapted)
    with pytest.raises(ValueError, match=LAYER + rf".*combination_type='{kind}' .*; use 'svd' or 'cat'"):
        adapted.add_weighted_adapter(["default", "shared"], [0.5, 0.5], "sum", combination_type=kind, density=0.5)
    assert_unchanged(before, adapted)
    assert list(adapted.peft_config) == ["default", "shared"]


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_combinations_with_rslora(kind: str) -> None:
    """PEFT copies use_rslora to the new adapter, whose scaling is then √r."""
    expected, adapted = made(use_rslora=True)
    beside(expected, adapted, "b", use_rslora=True, lora_alpha=7)
    train(adapted)
    more = {} if kind == "cat" else {"svd_rank": 8} if kind == "svd" else {"svd_rank": 16, "density": 1.0}
    weights = {"default": 0.6, "b": 0.4} if kind != "ties_svd" else {"default": 1.0}
    adapted.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type=kind, **more)
    adapted.set_adapter("sum")
    exact = output(expected.model(adapted, weights))
    assert moved(exact, output(adapted)) <= 2 * allowed(torch.float32)


def test_a_combination_of_dora_is_refused() -> None:
    _, adapted = made(use_dora=True)
    adapted.add_adapter("b", config("llama", use_dora=True))
    before = unchanged(adapted)
    with pytest.raises(ValueError, match=LAYER + r".*'default' \(Dora\) is more than a product B·A"):
        adapted.add_weighted_adapter(["default", "b"], [0.5, 0.5], "sum", combination_type="cat")
    assert_unchanged(before, adapted)


def test_plain_adapters_are_combined_by_peft() -> None:
    expected, adapted = made()
    beside(expected, adapted, "a", init_lora_weights=True)
    beside(expected, adapted, "b", init_lora_weights=True)
    train(adapted)
    adapted.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    assert adapted.peft_config["sum"].init_lora_weights is True
    exact = output(expected.model(adapted, {"a": 0.5, "b": 2.0}))
    assert moved(exact, output(adapted)) <= allowed(torch.float32)
