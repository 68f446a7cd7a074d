"""Whole models through PEFT: the accuracy of every matrix against float64, and the output, which must not change."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk

from ...support.adapted import config, lora_layers, moved
from ...support.models import TARGETS, build, linear_weights, output
from ...support.reference import ROUNDOFF, energy_deficit, optimal_energies

MODELS = sorted(TARGETS)


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_every_architecture(name: str, rank: int) -> None:
    """Wide enough for the Krylov path, through the hook, against an fp64 SVD."""
    base = build(name, width=384, layers=1)
    originals = {key: weight.detach().clone() for key, weight in linear_weights(base, name)}
    with pk.patch_peft() as report:
        model = peft.get_peft_model(base, config(name, r=rank, lora_alpha=rank))
    assert {layer.name for layer in report.layers} == set(originals)
    for layer in report.layers:
        lora = lora_layers(model)[layer.name]
        W = originals[layer.name].mT if name == "gpt2" else originals[layer.name]
        assert layer.shape == tuple(W.shape)
        assert layer.rank == rank
        assert layer.certificate.converged
        assert energy_deficit(W, lora.lora_A["default"].weight) <= 1e-6


@pytest.mark.parametrize("niter", [1, 2, 4, 16])
@pytest.mark.parametrize("name", MODELS)
def test_niter_is_at_least_as_accurate_as_pefts_on_every_matrix(name: str, niter: int) -> None:
    base = build(name, width=384, layers=1)
    originals = dict(linear_weights(copy.deepcopy(base), name))
    init = {"r": 16, "lora_alpha": 16, "init_lora_weights": f"pissa_niter_{niter}"}
    torch.manual_seed(0)
    theirs = lora_layers(peft.get_peft_model(copy.deepcopy(base), config(name, **init)))
    with pk.patch_peft():
        ours = lora_layers(peft.get_peft_model(base, config(name, **init)))
    for key, stored in originals.items():
        W = stored.detach().mT if name == "gpt2" else stored.detach()
        energies = optimal_energies(W)
        deficits = [energy_deficit(W, layers[key].lora_A["default"].weight, energies) for layers in (ours, theirs)]
        assert deficits[0] <= deficits[1] + 1e-9, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "lora_alpha": 8},
        {"rank_pattern": {"q_proj": 2, "c_attn": 2, "query": 2}},
        {"alpha_pattern": {"down_proj": 32, "c_proj": 32, "dense": 32}},
        {"use_dora": True},
        {"init_lora_weights": "pissa_niter_4", "lora_alpha": 13},
    ],
    ids=["plain", "rslora", "rank_pattern", "alpha_pattern", "dora", "niter"],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_output_does_not_change(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    base = build(name, dtype)
    original = copy.deepcopy(base)
    expected = output(base)
    originals = {key: weight.detach().clone() for key, weight in linear_weights(base, name)}
    with pk.patch_peft() as report:
        model = peft.get_peft_model(base, config(name, **changes)).eval()
    assert len(report.layers) == len(originals)
    # rounding in this dtype alone changes the output by this much; W_res and the product add to it
    own = moved(output(original.double()), expected)
    assert moved(expected, output(model)) <= 2 * own
    for key, lora in lora_layers(model).items():
        A, B, s = lora.lora_A["default"].weight, lora.lora_B["default"].weight, lora.scaling["default"]
        W, residual = originals[key].double(), lora.get_base_layer().weight.double()
        product = s * B.double() @ A.double()
        magnitude = s * B.double().abs() @ A.double().abs()
        if name == "gpt2":
            product, magnitude = product.mT, magnitude.mT
        arithmetic = (lora.r["default"] + 2) * 2**-24 * (W.abs() + magnitude)
        u, tiny = ROUNDOFF[dtype], torch.finfo(dtype).tiny
        bound = u * ((W - product).abs() + arithmetic) + arithmetic + u * tiny
        assert ((residual - (W - product)).abs() <= bound).all(), key
        assert lora.get_base_layer().weight.dtype == dtype
        assert lora.get_base_layer().weight.is_contiguous()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_a_trained_adapter_reloads_under_the_hook(name: str, init: str, tmp_path: Any) -> None:
    """Stock PEFT computes another residual at every reload of pissa_niter_N, because its sketch is not seeded."""
    base = build(name)
    untouched = copy.deepcopy(base)
    with pk.patch_peft():
        model = peft.get_peft_model(base, config(name, init_lora_weights=init)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:  # instead of training
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
            parameter.data.add_(0.05 * parameter.std() * noise)
    trained = output(model)
    assert moved(trained, output(untouched)) > 1e-3
    model.save_pretrained(tmp_path)
    with pk.patch_peft() as report:
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path).eval()
    assert report.layers
    assert torch.equal(output(reloaded), trained)
    if init == "pissa_niter_4":
        torch.manual_seed(1)
        stock = peft.PeftModel.from_pretrained(untouched, tmp_path).eval()
        assert moved(trained, output(stock)) > 1e-3, "stock PEFT reloads it too: this test proves nothing"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_conversion_to_plain_lora(name: str, tmp_path: Any) -> None:
    """PEFT's documented recipe: the trained adapter as a LoRA of rank 2r for the untouched base."""
    base = build(name)
    untouched = copy.deepcopy(base)
    with pk.patch_peft():
        model = peft.get_peft_model(base, config(name)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
            parameter.data.add_(0.05 * parameter.std() * noise)
    trained = output(model)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    converted = peft.PeftModel.from_pretrained(untouched, tmp_path / "converted").eval()
    assert moved(trained, output(converted)) <= 64 * ROUNDOFF[torch.float32]


def test_merging_restores_the_original_weights() -> None:
    base = build("llama")
    originals = {key: weight.detach().clone() for key, weight in linear_weights(base, "llama")}
    with pk.patch_peft():
        model = peft.get_peft_model(base, config("llama"))
    for key, weight in linear_weights(model.merge_and_unload(), "llama"):
        torch.testing.assert_close(
            weight.detach(), originals[key], rtol=0, atol=8 * 2**-24 * float(originals[key].abs().max())
        )
