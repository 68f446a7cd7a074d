"""check_quantized on single layers: what no hash tells, and what another machine may round otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pissa_kernels.checkpoint.check_quantized import QuantizedCheck, check_adapted, check_plain
from pissa_kernels.factors import Recipe
from pissa_kernels.quantize.bnb import EightBit, FourBit
from pissa_kernels.quantize.iteration import quantized_factors
from pissa_kernels.quantize.scheme import Scheme
from pissa_kernels.report import LayerReport

from ..support.reference import realistic


@dataclass(frozen=True)
class Layer:
    weight: Tensor
    A: Tensor
    B: Tensor
    stored: dict[str, Tensor]
    report: LayerReport
    scheme: Scheme

    def check(self, **changes: Any) -> QuantizedCheck:
        changed = replace(self, **changes)
        return check_adapted(changed.weight, changed.stored, changed.A, changed.B, changed.report, changed.scheme)


SCHEMES: dict[str, Scheme] = {
    "nf4": FourBit("nf4"),
    "nf4-double": FourBit("nf4", double=True),
    "fp4": FourBit("fp4", block=128),
    "int8": EightBit(),
}


def layer_of(scheme: Scheme, dtype: torch.dtype = torch.bfloat16, iterations: int = 3) -> Layer:
    weight = (realistic(192, 256, seed=3) * 0.02).to(dtype)
    recipe = Recipe(8, 0.5)
    found = quantized_factors(weight, recipe, scheme, iterations)
    report = LayerReport(
        "layer", (192, 256), 8, found.certificate, 0.0, found.singular_values, dtype, 0.5, "pissa", 0,
        quantization=found.quantization,
    )  # fmt: skip
    return Layer(weight, found.lora_A.to(dtype), found.lora_B.to(dtype), found.packed.tensors(), report, scheme)


@pytest.fixture(scope="module", params=SCHEMES)
def layer(request: pytest.FixtureRequest) -> Layer:
    return layer_of(SCHEMES[request.param])


def test_errors_of_a_layer(layer: Layer) -> None:
    check = layer.check()
    assert (check.problem, check.apart) == ("", 0)
    product = 0.5 * layer.B.double() @ layer.A.double()
    values = layer.scheme.unpack(layer.stored).dequantize().double()
    assert check.error == pytest.approx(float((layer.weight.double() - product - values).norm()), rel=1e-12)
    without = layer.scheme.quantize(layer.weight.float(), layer.weight.dtype).dequantize().double()
    assert check.error_without == pytest.approx(float((layer.weight.double() - without).norm()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", SCHEMES)
def test_residual_that_is_rounded_otherwise(kind: str, dtype: torch.dtype) -> None:
    """As on another machine: each element of the residual is a rounding or two away. Its codes hold all the same."""
    layer = layer_of(SCHEMES[kind], dtype)
    product = 0.5 * layer.B.double() @ layer.A.double()
    residual = layer.weight.double() - product
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty_like(residual).uniform_(-1, 1, generator=generator)
    size = layer.weight.double().abs() + 0.5 * layer.B.double().abs() @ layer.A.double().abs()
    other = (residual + 2 * 2.0**-24 * size * noise).float()
    stored = layer.scheme.quantize(other, dtype).tensors()
    check = layer.check(stored=stored)
    assert check.problem == ""
    changed = [key for key in stored if not torch.equal(stored[key], layer.stored[key])]
    assert bool(check.apart) == bool(changed)
    assert changed or kind == "int8", "int8 rounds the residual to float16, which removes most of the noise"


def test_codes_that_are_not_the_nearest(layer: Layer) -> None:
    codes = layer.stored["weight"].clone()
    flat = codes.view(-1).view(torch.uint8)
    flat[7] ^= 0x40
    check = layer.check(stored={**layer.stored, "weight": codes})
    assert "1 bytes are not those of Q(W − s·B·A)" in check.problem
    assert check.apart == 1


def test_other_scales(layer: Layer) -> None:
    key = "SCB" if "SCB" in layer.stored else "weight.absmax"
    scales = layer.stored[key].clone()
    scales[1] = scales[1] + 40 if scales.dtype == torch.uint8 else scales[1] * 1.05
    assert "are not those of Q(W − s·B·A)" in layer.check(stored={**layer.stored, key: scales}).problem


@pytest.mark.parametrize(
    ("field", "words"), [("error", "the error is"), ("error_without", "the error without PiSSA is")]
)
@pytest.mark.parametrize("factor", [1 - 3e-4, 1 + 3e-4])
def test_other_errors_in_the_report(field: str, words: str, factor: float, layer: Layer) -> None:
    quantization = layer.report.quantization
    assert quantization is not None
    changed = replace(quantization, **{field: getattr(quantization, field) * factor})
    assert layer.check(report=replace(layer.report, quantization=changed)).problem.startswith(words)


def test_one_iteration_is_held_against_its_certificate() -> None:
    """A and B are then triplets of the weight. Rotated, they have the same product, and are none."""
    layer = layer_of(FourBit("nf4"), torch.float32, iterations=1)
    assert layer.check().problem == ""
    certificate = replace(layer.report.certificate, energy=layer.report.certificate.energy * 0.99)
    found = layer.check(report=replace(layer.report, certificate=certificate)).problem
    assert found.startswith("the energy is")
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    found = layer.check(A=turn.mT @ layer.A, B=layer.B @ turn).problem
    assert "are not the singular values in the report" in found
    assert "the triplets have a residual of" in found


def test_another_report(layer: Layer) -> None:
    quantization = layer.report.quantization
    assert quantization is not None
    for changes, words in (
        ({"quantization": None}, "describes no weight in"),
        ({"quantization": replace(quantization, scheme="nf4, blocks of 4096")}, "describes no weight in"),
        ({"dtype": torch.float32}, "describes another weight"),
        ({"rank": 4}, "A is"),
    ):
        with pytest.raises(ValueError, match=words):
            layer.check(report=replace(layer.report, **changes))


def test_layer_without_adapter(layer: Layer) -> None:
    stored = layer.scheme.quantize(layer.weight.float(), layer.weight.dtype).tensors()
    check = check_plain("layer", layer.weight, stored, layer.scheme)
    assert (check.problem, check.apart, check.error) == ("", 0, check.error_without)
    assert check.error == pytest.approx(layer.check().error_without, rel=1e-12)
    assert "are not those of Q(W)" in check_plain("layer", layer.weight, layer.stored, layer.scheme).problem
