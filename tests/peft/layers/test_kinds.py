"""Every kind of layer at the start: against float64 SVDs of the matrices that PEFT's forward pass makes of it."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import pissa_kernels as pk

from ...support.kinds import KINDS, build, lora_config
from ...support.kinds_operations import allowed, exact_output, off, output, patched
from ...support.kinds_reference import computed, rounded_deficit, stock, within_groups
from ...support.reference import ROUNDOFF, energy_deficit, optimal_energies, singular_values

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.slow),
]
# in bfloat16, what rounding A leaves as a rule; see rounded_deficit
DEFICIT = {torch.float32: 1e-6, torch.bfloat16: 2.5e-6}
RANK = 6

Terms = dict[str, tuple[Tensor, Tensor]]


def terms(name: str, base: Any, model: Any, magnitudes: bool = False) -> Terms:
    """For each weight, what the model computes with but the adapter, and what the adapter adds, in float64.

    Args:
        magnitudes: add |B|·|A|.
    """
    kind = KINDS[name]
    alone = stock(name, base, model.peft_config["default"], model.state_dict(), magnitudes)
    both = computed(name, base, alone)
    with alone.disable_adapter():
        residual = computed(name, base, alone)
    found = {}
    for key in kind.weights:
        added, kept = both[key] - residual[key], residual[key]
        if kind.groups > 1:
            added, outside = within_groups(added, kind.groups)
            assert magnitudes or not outside.any(), "the adapter connects groups, and the residual cannot"
            kept, _ = within_groups(kept, kind.groups)
        found[key] = (kept, added)
    return found


def rank_of(name: str) -> int:
    """A rank for each matrix that is below the smaller side."""
    return 2 if name == "Conv2d, depthwise" else RANK


@pytest.mark.parametrize(
    ("init", "dtype"),
    [
        pytest.param("pissa", torch.float32, id="float32"),
        pytest.param("pissa", torch.bfloat16, id="bfloat16"),
        pytest.param("pissa_niter_4", torch.float32, id="float32, niter", marks=pytest.mark.slow),
        pytest.param("pissa_niter_4", torch.bfloat16, id="bfloat16, niter", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_every_matrix_against_an_exact_svd(name: str, init: str, dtype: torch.dtype) -> None:
    """Wide enough for the iteration: energy of the factors, report, and W_res + ΔW = W to one rounding."""
    kind, rank = KINDS[name], rank_of(name)
    base = build(name, dtype, kind.wide)
    model, report = patched(name, base, rank, init_lora_weights=init)
    entries = {layer.name: layer for layer in report.layers}
    assert entries.keys() == kind.weights.keys()
    added, magnitudes = terms(name, base, model), terms(name, base, model, magnitudes=True)
    for key, parameter in kind.weights.items():
        W = base.get_parameter(parameter).detach().double()
        matrices, layer = kind.matrices(W), entries[key]
        parts = layer.parts or (layer,)
        assert len(parts) == len(matrices)
        assert (layer.rank, layer.init, layer.dtype) == (rank, init, dtype)
        assert layer.scaling == (4.0 if key.endswith("out_proj") else 2.0), "PEFT adds the one of out_proj twice"
        for index, (exact, change) in enumerate(zip(matrices, kind.matrices(added[key][1]), strict=True)):
            part = parts[index]
            assert part.name == (f"{key}[{index}]" if layer.parts else key)
            assert part.shape == tuple(exact.shape)
            assert part.certificate.converged or init != "pissa"
            spectrum, energies = singular_values(exact), optimal_energies(exact)
            rows = torch.linalg.svd(change, full_matrices=False)
            assert rows.S[rank:].sum() <= 1e-12 * rows.S[0], "a matrix has more than its rank"
            deficit = energy_deficit(exact, rows.Vh[:rank], energies)
            allowance = max(DEFICIT[dtype], rounded_deficit(exact, rank, layer.scaling, dtype))
            if init != "pissa":
                allowance = max(allowance, iterated(exact, rank, energies))
            assert deficit <= allowance, (key, index)
            captured = float(part.singular_values.double().square().sum())
            held = float(energies[rank - 1]) * (1 - deficit)
            # σ̂ are those of a left and a right basis, before A is rounded: once the iteration has converged, the rows
            # hold as much, otherwise at least as much but for the rounding, which is of first order then
            close = 1e-5 if part.certificate.converged else 2.0**-8 * ROUNDOFF[dtype]
            assert captured <= held * (1 + max(close, 1e-5))
            assert captured >= held * (1 - close) or not part.certificate.converged
            assert part.certificate.energy == pytest.approx(captured / float(energies[-1]), rel=1e-5)
            if init == "pissa":
                assert (part.singular_values.double() - spectrum[:rank]).abs().max() <= 1e-4 * spectrum[0]
        whole = sum(float(matrix.square().sum()) for matrix in matrices)
        captured = sum(float(part.singular_values.double().square().sum()) for part in parts)
        assert layer.certificate.energy == pytest.approx(captured / whole, rel=1e-5)
        assert layer.certificate.converged == all(part.certificate.converged for part in parts)
        # the residual is W − ΔW to one rounding, as a dense layer's
        kept, low_rank = added[key]
        arithmetic = (rank * kind.groups + 2) * 2**-24 * (W.abs() + magnitudes[key][1])
        bound = ROUNDOFF[dtype] * ((W - low_rank).abs() + arithmetic) + arithmetic
        bound += ROUNDOFF[dtype] * torch.finfo(dtype).tiny
        assert ((kept - (W - low_rank)).abs() <= bound).all(), key


def iterated(W: Tensor, rank: int, energies: Tensor) -> float:
    """Energy deficit of what ``pissa_niter_4`` is in PEFT: four rounds with a block of the rank's width."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, _, V = torch.svd_lowrank(W, q=rank, niter=4)
    return energy_deficit(W, V.mT, energies)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "niter": {"init_lora_weights": "pissa_niter_4"},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "rank_pattern": {"down_proj": 2, "table": 3, "layer": 8},
        "alpha_pattern": {"gate_up_proj": 7, "table": 7, "layer": 11},
    },
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "bias": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
}
CASES = [
    (name, option)
    for name, kind in KINDS.items()
    for option in OPTIONS
    if option.split()[-1].removesuffix("es") not in ("dora", "dropout", "bias")
    or option.split()[-1].removesuffix("es") in kind.options
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "option"), CASES)
def test_the_output_does_not_change(name: str, option: str, dtype: torch.dtype) -> None:
    base = build(name, dtype)
    untouched = copy.deepcopy(base.state_dict())
    model, report = patched(name, base, **OPTIONS[option])
    assert {layer.name for layer in report.layers} == KINDS[name].weights.keys()
    assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in untouched.items())
    adapted = model.base_model.model.layer.get_base_layer().state_dict()
    for parameter in base.layer.state_dict():
        if f"layer.{parameter}" not in KINDS[name].weights.values():  # biases
            stored = adapted.get(parameter, adapted.get(parameter.replace("out_proj.", "out_proj.base_layer.")))
            assert torch.equal(stored, untouched[f"layer.{parameter}"])


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if "dora" not in kind.options])
def test_an_option_that_peft_does_not_have_leaves_the_model(name: str) -> None:
    base = build(name)
    before = copy.deepcopy(base.state_dict())
    types = [type(module) for module in base.modules()]
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)dora"), pk.patch_peft():
        peft.get_peft_model(base, lora_config(name, use_dora=True))
    assert [type(module) for module in base.modules()] == types
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_adapters_in_the_dtype_of_the_model(name: str) -> None:
    """``autocast_adapter_dtype=False``: the forward pass multiplies in bfloat16, and rounds what it has multiplied."""
    base = build(name, torch.bfloat16)
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base), lora_config(name), autocast_adapter_dtype=False).eval()
    assert {value.dtype for key, value in model.state_dict().items() if "lora_" in key} == {torch.bfloat16}
    added = terms(name, base, model)
    for key, parameter in KINDS[name].weights.items():
        W = base.get_parameter(parameter).detach().double()
        for exact, change in zip(KINDS[name].matrices(W), KINDS[name].matrices(added[key][1]), strict=True):
            rows, energies = torch.linalg.svd(change, full_matrices=False).Vh[:4], optimal_energies(exact)
            best = rounded_deficit(exact, 4, 2.0, torch.bfloat16)
            assert energy_deficit(exact, rows, energies) <= max(DEFICIT[torch.bfloat16], best)
        kept, low_rank = added[key]
        assert (kept - (W - low_rank)).norm() <= ROUNDOFF[torch.bfloat16] * (kept.norm() + 1e-4 * W.norm())


@pytest.mark.parametrize("name", KINDS)
def test_the_same_call_gives_the_same_factors(name: str) -> None:
    base = build(name)
    torch.manual_seed(0)
    first, _ = patched(name, base)
    torch.manual_seed(1)
    second, _ = patched(name, base)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_a_rank_above_the_smaller_side(name: str) -> None:
    """Clipped as in a dense layer: the factors that there are, and nothing in the remaining rows and columns."""
    base = build(name)
    with pytest.warns(UserWarning, match="rank"):
        model, report = patched(name, base, 64)
    for layer in report.layers:
        assert layer.rank == min(layer.shape)
    assert off(exact_output(name, base), output(name, model)) <= allowed(name, base)
