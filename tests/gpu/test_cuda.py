"""The same code on CUDA tensors: the accuracy of the CPU tests, and agreement with the CPU."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import pissa_kernels as pk

from ..support.models import TARGETS, build, output
from ..support.reference import ROUNDOFF, energy_deficit, realistic

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1024, 1024), (2048, 768), (768, 2048), (60, 40)])
@pytest.mark.parametrize("tf32", [False, True])
def test_decompose_on_cuda(shape: tuple[int, int], dtype: torch.dtype, tf32: bool) -> None:
    W = realistic(*shape).to(dtype)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        d = pk.decompose(W.cuda(), 16, adapter_dtype=torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert d.lora_A.is_cuda
    assert energy_deficit(W, d.lora_A.cpu()) <= 1e-6
    cpu = pk.decompose(W, 16, adapter_dtype=torch.float32)
    assert (d.singular_values.cpu() - cpu.singular_values).abs().max() <= 1e-5 * cpu.singular_values[0]
    error = W.double() - d.residual.cpu().double() - d.lora_B.cpu().double() @ d.lora_A.cpu().double()
    assert error.norm() <= 2 * ROUNDOFF[dtype] * W.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_model_on_cuda(name: str, dtype: torch.dtype) -> None:
    base = build(name, dtype).cuda()
    original = copy.deepcopy(base)
    ids = torch.arange(24, device="cuda").reshape(2, 12)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            result = model(input_ids=ids)
        return (result.logits if "logits" in result else result.last_hidden_state).double().cpu()

    expected = logits(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2"
    )
    state = torch.cuda.get_rng_state()
    with pk.patch_peft() as report:
        model = peft.get_peft_model(base, config).eval()
    assert report.layers
    assert torch.equal(state, torch.cuda.get_rng_state())
    own = (logits(original.double()) - expected).norm()
    assert (logits(model) - expected).norm() <= 4 * own
    assert output(original.cpu()).isfinite().all()
