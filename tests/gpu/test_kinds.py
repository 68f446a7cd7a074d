"""Every kind of layer on a GPU, and streamed through it: W_res + s·B·A = W, and the energy of A."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers
from pissa_kernels.adapter.layouts import layout_of

from ..support.kinds import KINDS, build, inputs_of, lora_config
from ..support.kinds_operations import allowed
from ..support.reference import ROUNDOFF, energy_deficit

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["resident", "streamed"])
@pytest.mark.parametrize("name", KINDS)
def test_every_matrix(name: str, way: str, dtype: torch.dtype) -> None:
    base = build(name, dtype, KINDS[name].wide)
    rank = 2 if name == "Conv2d, depthwise" else 6
    model = copy.deepcopy(base).to("cuda") if way == "resident" else copy.deepcopy(base)
    with pk.patch_peft(device="cuda" if way == "streamed" else None) as report:
        adapted = peft.get_peft_model(model, lora_config(name, rank))
    assert len(report.layers) == len(KINDS[name].weights)
    layers = dict(lora_layers(adapted))
    for entry in report.layers:
        layout = layout_of(layers[entry.name])
        assert entry.certificate.converged
        assert layout.weight.is_cuda == (way == "resident")
        parameter = base.get_parameter(KINDS[name].weights[entry.name])
        originals = layout.matrices(parameter.detach().double())
        residuals = layout.matrices(layout.weight.detach().cpu().double())
        factors = layout.split(*(factor.detach().cpu().double() for factor in layout.factors("default")))
        scaling = float(layout.scalings["default"])
        for W, W_res, A, B in zip(originals, residuals, *factors, strict=True):
            error = (W - W_res - scaling * B @ A).abs()
            assert bool((error <= 2 * ROUNDOFF[dtype] * W_res.abs() + 2e-6 * W.abs().max()).all())
            assert energy_deficit(W, A) <= 4e-6


@pytest.mark.parametrize("name", KINDS)
def test_the_output(name: str) -> None:
    base = build(name)
    x = inputs_of(name, base)
    expected = base(x).detach().double()
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base).to("cuda"), lora_config(name))
    with torch.no_grad():
        found = model(x.to("cuda")).cpu().double()
        with pk.original_model(model):
            original = model(x.to("cuda")).cpu().double()
    bound = 4 * allowed(name, base)
    assert float((found - expected).norm() / expected.norm()) <= bound
    assert float((original - expected).norm() / expected.norm()) <= bound
