"""The iteration: against the same one with float64 SVDs, against LoftQ of PEFT, and what its report says."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("bitsandbytes", reason="the formats are those of bitsandbytes, which is not installed")

from bench.quantized.loftq import loftq
from pissa_kernels.factors import Recipe
from pissa_kernels.quantize.bnb import EightBit, FourBit
from pissa_kernels.quantize.iteration import (
    LEAST_GAIN,
    MOST_AUTOMATIC,
    QuantizedFactors,
    check_iterations,
    quantized_factors,
    quantized_residual,
)

from ..support.models import build, linear_weights
from ..support.quantized_iteration import exact_errors, plain_error
from ..support.reference import energy_deficit, real_weights, realistic, with_spectrum

NF4, FP4, INT8 = FourBit("nf4", 64, double=True), FourBit("fp4", 64), EightBit()
# Share of itself by which an error may differ from that of the iteration with float64 SVDs.
CLOSE = 2e-3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def minilm(name: str, layer: int = 0) -> Tensor:
    return real_weights()[f"encoder.layer.{layer}.{name}.weight"]


@functools.cache
def model_weight(name: str) -> Tensor:
    """A weight (out, in) of a small model; that of GPT-2 is a transposed view, as its Conv1D stores it."""
    architecture, _, key = name.partition(" ")
    weights = dict(linear_weights(build(architecture, torch.bfloat16, width=128, layers=1), architecture))
    weight = next(value for path, value in weights.items() if path.endswith(key)).data
    return weight.mT if architecture == "gpt2" else weight


def error(weight: Tensor, found: QuantizedFactors, scaling: float) -> Tensor:
    """W − W_q − s·B·A in float64, W_q from what a checkpoint stores."""
    kind = EightBit() if "SCB" in found.packed.tensors() else FourBit()
    values = kind.unpack(found.packed.tensors()).dequantize().double()
    return weight.double() - values - scaling * (found.lora_B.double() @ found.lora_A.double())


@dataclass
class Recording:
    """A scheme that keeps the values of all that it quantizes, and may add an error to those after the n-th."""

    scheme: Any = NF4
    worse_after: int | None = None
    values: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.scheme.name)

    def quantize(self, weight: Tensor, dtype: torch.dtype) -> Any:
        if self.worse_after is not None and len(self.values) >= self.worse_after:
            weight = weight * 1.5
        packed = self.scheme.quantize(weight, dtype)
        self.values.append(packed.dequantize())
        return packed


CASES = {
    "minilm query": lambda: minilm("attention.self.query"),
    "minilm output": lambda: minilm("output.dense", 3),
    "llama down_proj": lambda: model_weight("llama down_proj"),
    "llama k_proj": lambda: model_weight("llama k_proj"),
    "mistral gate_proj": lambda: model_weight("mistral gate_proj"),
    "gpt2 attn.c_attn": lambda: model_weight("gpt2 attn.c_attn"),
    "gpt2 mlp.c_proj": lambda: model_weight("gpt2 mlp.c_proj"),
}


@pytest.mark.parametrize("scheme", [NF4, FP4, INT8], ids=lambda scheme: scheme.name[:4])
def test_errors_are_those_of_the_iteration_with_float64_svds(scheme: Any) -> None:
    """After one iteration, those of each weight. Then a quantizer turns a perturbation of 1e-6 into other codes, and
    five iterations with float64 SVDs into errors that differ by up to 0.4 % on a weight as small as these; in both
    directions, so that the errors of all weights together are as close to each other as after one."""
    perturbations = ((0.0, 0), (1e-6, 1), (1e-6, 2))
    ours, loops = 0.0, torch.zeros(len(perturbations), dtype=torch.float64)
    for case, weight_of in CASES.items():
        weight = weight_of().bfloat16()[:192, :256]
        one, five = (quantized_factors(weight, Recipe(8, 2.0), scheme, count).quantization for count in (1, 5))
        found = [exact_errors(weight, 8, 2.0, scheme, 5, noise=noise, seed=seed) for noise, seed in perturbations]
        assert one.iterations == 1
        assert one.error == pytest.approx(found[0][0], rel=CLOSE), case
        plain = float(plain_error(weight, scheme).norm())
        assert one.error_without == five.error_without == pytest.approx(plain, rel=1e-6), case
        assert five.error < one.error < plain, case
        smallest = torch.tensor([min(errors) for errors in found], dtype=torch.float64)
        assert five.error <= smallest.amax() * (1 + 2 * CLOSE), case
        ours += five.error**2
        loops += smallest.square()
    assert loops.amin().sqrt() * (1 - CLOSE) <= math.sqrt(ours) <= loops.amax().sqrt() * (1 + CLOSE)


@pytest.mark.slow
def test_every_weight_of_minilm() -> None:
    weights = real_weights()
    assert len(weights) >= 36
    totals = torch.zeros(3, 2, dtype=torch.float64)  # squares of plain, one and five; ours and exact
    for name, weight in weights.items():
        weight = weight.bfloat16()
        one, five = (quantized_factors(weight, Recipe(16), NF4, count).quantization for count in (1, 5))
        exact = exact_errors(weight, 16, 1.0, NF4, 5)
        plain = float(plain_error(weight, NF4).norm())
        assert one.error == pytest.approx(exact[0], rel=CLOSE), name
        assert five.error == pytest.approx(exact[4], rel=2 * CLOSE), name  # of one weight; see above
        assert five.error < one.error < plain, name
        ours, theirs = (one.error_without, one.error, five.error), (plain, exact[0], exact[4])
        totals += torch.tensor([ours, theirs], dtype=torch.float64).mT.square()
    ratios = (totals[:, 0] / totals[:, 1]).sqrt()
    assert (ratios - 1).abs().amax() <= CLOSE / 2, ratios


@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("name", ["attention.self.query", "intermediate.dense"])
def test_qpissa_loses_less_than_loftq_and_loftq_less_than_plain(name: str, rank: int, iterations: int) -> None:
    """The order of the paper's table 3, in the Frobenius and in the nuclear norm, with LoftQ as PEFT has it."""
    weight = minilm(name, layer=2)[:384]
    scheme = FourBit("nf4")  # LoftQ's: no double quantization
    ours = quantized_factors(weight, Recipe(rank), scheme, iterations, nuclear=True).quantization
    values, A, B = loftq(weight, rank, iterations)
    theirs, plain = weight.double() - values.double() - B.double() @ A.double(), plain_error(weight, scheme)
    assert ours.error < float(theirs.norm()) < float(plain.norm())
    assert ours.nuclear_error is not None
    assert ours.nuclear_error < nuclear(theirs) < nuclear(plain)


def nuclear(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [NF4, FP4, FourBit("nf4", 256), INT8], ids=lambda scheme: scheme.name[:14])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (80, 80)])
def test_the_report_says_what_is_lost(shape: tuple[int, int], scheme: Any, dtype: torch.dtype) -> None:
    weight, scaling = realistic(*shape).to(dtype), 16 / math.sqrt(8)  # as rsLoRA has it
    before = weight.clone()
    found = quantized_factors(weight, Recipe(8, scaling), scheme, 3, nuclear=True)
    lost, plain = error(weight, found, scaling), plain_error(weight, scheme)
    report = found.quantization
    assert report.scheme == scheme.name
    # the residual is summed in float32 before it is quantized
    assert report.error == pytest.approx(float(lost.norm()), rel=1e-5)
    assert report.error_without == pytest.approx(float(plain.norm()), rel=1e-6)
    assert report.nuclear_error == pytest.approx(nuclear(lost), rel=1e-5)
    assert report.nuclear_error_without == pytest.approx(nuclear(plain), rel=1e-5)
    assert report.saved == pytest.approx(1 - float(lost.norm() / plain.norm()), abs=1e-4)
    assert (found.lora_A.shape, found.lora_B.shape) == ((8, shape[1]), (shape[0], 8))
    for factor in (found.lora_A, found.lora_B):
        assert factor.dtype == torch.float32
        assert torch.equal(factor.to(dtype).float(), factor)
    assert torch.equal(weight, before)


def test_errors_of_a_large_weight_are_not_summed_in_float32() -> None:
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    scheme = FourBit("nf4")
    found = quantized_factors(weight, Recipe(1), scheme, 1).quantization
    assert found.error_without == pytest.approx(float(plain_error(weight, scheme).norm()), rel=1e-7)


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("scheme", [NF4, INT8], ids=lambda scheme: scheme.name[:4])
def test_the_same_factors_give_the_same_codes(scheme: Any, adapter_dtype: torch.dtype) -> None:
    weight = realistic(96, 128).bfloat16()
    found = quantized_factors(weight, Recipe(8, 0.5), scheme, adapter_dtype=adapter_dtype)
    again = quantized_residual(weight, found.lora_A, found.lora_B, 0.5, scheme)
    assert again.tensors().keys() == found.packed.tensors().keys()
    for key, value in again.tensors().items():
        assert torch.equal(value, found.packed.tensors()[key]), key


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_strides_change_nothing(shape: tuple[int, int]) -> None:
    weight = realistic(*shape).bfloat16()
    transposed = weight.mT.contiguous().mT
    assert not transposed.is_contiguous()
    for scheme in (NF4, INT8):
        ours, theirs = (quantized_factors(matrix, Recipe(8), scheme) for matrix in (weight, transposed))
        assert torch.equal(ours.packed.codes, theirs.packed.codes)  # type: ignore[attr-defined]
        assert torch.equal(ours.lora_A, theirs.lora_A)
        assert ours.quantization == theirs.quantization
        residual = quantized_residual(transposed, ours.lora_A, ours.lora_B, 1.0, scheme)
        assert torch.equal(residual.codes, ours.packed.codes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("rank", [40, 72, 96])
@pytest.mark.parametrize("scheme", [NF4, INT8], ids=lambda scheme: scheme.name[:4])
def test_ranks_near_the_smaller_side(scheme: Any, rank: int) -> None:
    """Errors become so small that rounding W − W_q to 16 bits would count."""
    weight = realistic(96, 128).bfloat16()
    found = quantized_factors(weight, Recipe(rank, 2.0), scheme)
    loops = [exact_errors(weight, rank, 2.0, scheme, 5, noise=noise, seed=1) for noise in (0.0, 1e-6, 1e-6)]
    assert found.quantization.error < 0.8 * found.quantization.error_without
    assert found.quantization.error <= max(min(errors) for errors in loops) * 1.02
    assert found.quantization.error == pytest.approx(float(error(weight, found, 2.0).norm()), rel=1e-4)


@pytest.mark.parametrize("scheme", [NF4, FP4, INT8], ids=lambda scheme: scheme.name[:4])
@pytest.mark.parametrize("iterations", [1, 5, "auto"])
def test_a_zero_weight_loses_nothing(iterations: Any, scheme: Any) -> None:
    found = quantized_factors(torch.zeros(48, 32, dtype=torch.bfloat16), Recipe(4), scheme, iterations, nuclear=True)
    report = found.quantization
    assert (report.error, report.error_without, report.nuclear_error, report.iterations) == (0, 0, 0, 1)
    assert report.saved == 0
    assert not found.lora_A.any()
    assert found.certificate.converged


@pytest.mark.parametrize("rank", [4, 16])
def test_auto_ends_where_an_iteration_gains_less_than_half_a_percent(rank: int) -> None:
    weight = minilm("attention.self.key")[:192, :192]
    automatic = quantized_factors(weight, Recipe(rank), NF4, "auto").quantization
    assert 2 <= automatic.iterations <= MOST_AUTOMATIC
    found = quantized_factors(weight, Recipe(rank), NF4, MOST_AUTOMATIC).quantization
    # a run with a fixed number does not measure its certificates on the way, and its last digits differ
    errors = [
        quantized_factors(weight, Recipe(rank), NF4, count).quantization.error
        for count in range(1, automatic.iterations + 1)
    ]
    gains = [before - after for before, after in itertools.pairwise(errors)]
    least = LEAST_GAIN * automatic.error_without
    assert all(gain > 0.8 * least for gain in gains[:-1])
    assert gains[-1] < 1.2 * least
    assert automatic.error == pytest.approx(errors[-1], rel=CLOSE)
    assert found.error <= automatic.error * (1 + CLOSE)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("iterations", [5, "auto"])
@pytest.mark.parametrize("worse_after", [2, 3, 4])
def test_an_iteration_that_does_not_help_is_not_taken(worse_after: int, iterations: Any, dtype: torch.dtype) -> None:
    weight = minilm("attention.self.value")[:256, :160].to(dtype)
    scheme: Any = Recording(worse_after=worse_after)  # the first that it quantizes is the weight itself
    found = quantized_factors(weight, Recipe(8), scheme, iterations, adapter_dtype=torch.float32)
    plain = quantized_factors(weight, Recipe(8), NF4, worse_after - 1, adapter_dtype=torch.float32)
    assert found.quantization.iterations == worse_after - 1
    assert found.quantization.error == pytest.approx(plain.quantization.error, rel=CLOSE)
    assert found.quantization.error == pytest.approx(float(error(weight, found, 1.0).norm()), rel=1e-5)
    # the certificate is of the factors that are returned
    left = weight.double() - (scheme.values[worse_after - 2].double() if worse_after > 2 else 0)
    check_certificate(weight, left, found)


def check_certificate(weight: Tensor, left: Tensor, found: QuantizedFactors) -> None:
    """The certificate against float64: A and B are float32, of the triplets of ``left``."""
    deficit = energy_deficit(left, found.lora_A)
    S = found.singular_values.double()
    U, V = found.lora_B.double() / S.sqrt(), (found.lora_A.double() / S.sqrt()[:, None]).mT
    residual = torch.maximum((left @ V - U * S).norm(dim=0), (left.mT @ U - V * S).norm(dim=0)).amax()
    # The triplets are those of the matrix as it is handed to the solver: in bfloat16 if the weight is.
    rounding = float((left - left.bfloat16().double()).norm())
    assert found.certificate.residual > 0
    assert residual <= found.certificate.residual * float(S[0]) * (1 + 1e-3) + rounding
    share = float(S.square().sum() / weight.double().square().sum())
    assert found.certificate.energy == pytest.approx(share, rel=1e-4)
    if found.certificate.converged:
        assert deficit <= 1.25e-5  # five tolerances of a bfloat16 weight


@pytest.mark.parametrize("scheme", [NF4, FP4, INT8], ids=lambda scheme: scheme.name[:4])
@pytest.mark.parametrize("case", CASES)
def test_the_certificate_is_of_the_last_iteration(case: str, scheme: Any) -> None:
    weight = CASES[case]().bfloat16()
    recorded: Any = Recording(scheme)
    found = quantized_factors(weight, Recipe(12), recorded, 5, adapter_dtype=torch.float32)
    assert found.quantization.iterations == 5
    left = weight.double() - recorded.values[-2].double()
    check_certificate(weight, left, found)
    # the gap on which a warm start relies
    values = torch.linalg.svdvals(left)
    assert values[12] < 0.5 * values[11]
    assert found.certificate.converged
    assert found.certificate.method == "warm"
    assert energy_deficit(left, found.lora_A) <= 5e-6


def test_int8_refuses_a_weight_beyond_float16() -> None:
    weight = realistic(32, 24).bfloat16()
    weight[3, 4] = 1e5
    with pytest.raises(ValueError, match="int8 rounds the weight to float16 first"):
        quantized_factors(weight, Recipe(4), INT8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = realistic(32, 24).float()
    weight[3, 4] = value
    with pytest.raises(ValueError, match=r"the weight holds (NaN|Inf)"):
        quantized_factors(weight, Recipe(4), NF4)


@pytest.mark.parametrize("given", [0, -1, 1.0, True, "all", None])
def test_other_numbers_of_iterations_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match="quant_iterations must be an integer ≥ 1 or 'auto'"):
        check_iterations(given)


def test_numbers_of_iterations() -> None:
    assert [check_iterations(given) for given in (1, 7, "auto")] == [1, 7, "auto"]


def test_memory_does_not_grow_with_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than 2¹⁸ elements are handed to bitsandbytes' quantizer at a time, which copies them several times."""
    import bitsandbytes.functional as functional

    sizes, quantize = [], functional.quantize_4bit

    def counting(chunk: Tensor, *args: Any, **settings: Any) -> Any:
        sizes.append(chunk.numel())
        return quantize(chunk, *args, **settings)

    monkeypatch.setattr(functional, "quantize_4bit", counting)
    monkeypatch.setenv("PISSA_KERNELS_BACKEND", "torch")  # csrc makes no copies
    weight = with_spectrum(1024, 768, torch.linspace(2, 1, 8)).bfloat16()
    quantized_factors(weight, Recipe(2), NF4, 1)
    assert max(sizes) <= 1 << 18
    assert sum(sizes) == 2 * weight.numel()
