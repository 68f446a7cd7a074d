"""One quantized weight against the original: what is stored is Q(W − s·B·A), and its errors are those of the report.

A and B are triplets of the weight less the W_q of the iteration before, which is not stored, so what can be checked
from the files alone is this:

- **Codes and statistics** are those of quantizing W − s·B·A again, with A and B as stored (of W for a layer without an
  adapter). On another kind of machine W − s·B·A is rounded otherwise, and where a value or a scale lies near the middle
  between two of the format's, either may be stored. Other codes are accepted where each value is as near to W − s·B·A
  up to the roundings of :func:`_tie`, and the error of all of them is the same up to :data:`OTHER_CODES`.
- **Errors.** ‖W − W_q − s·B·A‖_F and ‖W − Q(W)‖_F in float64 are those of the report. The float32 product is within
  (r + 2)·u₃₂·(|W| + s·|B|·|A|) (Higham 2002, §3.1), the difference within u₃₂ of itself, and ‖·‖_F is summed in float32
  along rows, in at least eight lanes. :data:`OTHER_CODES` covers codes of another machine.
- **A and B** have the norms of the report's singular values. After one iteration they are triplets of W, and
  :mod:`pissa_kernels.checkpoint.check_layer` compares them with their certificate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..numerics import BLOCK_ELEMENTS, UNIT_ROUNDOFF
from ..quantize.bnb import FourBit
from ..quantize.iteration import quantized_residual, quantized_weight
from ..quantize.scheme import Packed, Scheme
from ..report import LayerReport
from .check_layer import (
    ENERGY_LANES,
    OTHER_NORMS,
    SMALL_ROUNDING,
    U32,
    measure_factors,
    measure_norms,
    other_factors,
    problems_of,
)

# Largest relative difference of an error that codes and scales of another kind of machine account for.
OTHER_CODES = 1e-5


@dataclass(frozen=True)
class QuantizedCheck:
    """What was found of one quantized weight.

    Attributes:
        name: name of the layer.
        error: ‖W − W_q − s·B·A‖_F, in float64; without the product for a layer without an adapter.
        error_without: ‖W − Q(W)‖_F, in float64.
        apart: bytes that differ from those of quantizing again on this machine.
        adapted: whether the layer has an adapter.
        problem: what does not hold, "" if everything does.
    """

    name: str
    error: float
    error_without: float
    apart: int
    adapted: bool
    problem: str


def check_plain(name: str, weight: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedCheck:
    """Check the quantized weight of a layer without an adapter.

    Args:
        name: name of the layer.
        weight: (out, in).
        tensors: what is stored, by what follows the layer's name and a dot.
        scheme: the format.

    Raises:
        ValueError: the tensors do not belong together, or the format cannot hold the weight.
    """
    stored, again = scheme.unpack(tensors), quantized_weight(weight, scheme)
    apart, problem = _compare(weight, None, tensors, stored, again, scheme)
    found = _error(weight, stored, None)
    return QuantizedCheck(name, found, found, apart, adapted=False, problem=problem)


def check_adapted(
    weight: Tensor, tensors: Mapping[str, Tensor], A: Tensor, B: Tensor, report: LayerReport, scheme: Scheme
) -> QuantizedCheck:
    """Check the quantized residual of a layer, and its adapter.

    Args:
        weight: (out, in).
        tensors: what is stored, by what follows the layer's name and a dot.
        A, B: (r, in) and (out, r), as stored.
        report: the layer's entry in the report of the run.
        scheme: the format.

    Raises:
        ValueError: the tensors do not belong together, or the report describes another weight.
    """
    quantization = report.quantization
    if quantization is None or quantization.scheme != scheme.name:
        raise ValueError(f"the report describes no weight in {scheme.name}")
    if (tuple(weight.shape), weight.dtype) != (report.shape, report.dtype):
        raise ValueError(f"the report describes another weight than {tuple(weight.shape)} {weight.dtype}")
    if problem := other_factors(A, B, report):
        raise ValueError(problem)
    product = report.scaling * B.double(), A.double()
    stored = scheme.unpack(tensors)
    again = quantized_residual(weight, A.float(), B.float(), report.scaling, scheme)
    apart, problem = _compare(weight, product, tensors, stored, again, scheme)
    problems = [problem] if problem else []
    error, without = _error(weight, stored, product), _error(weight, quantized_weight(weight, scheme), None)
    size = float(torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).double().norm())
    rounding = (report.rank + 2) * U32 * (size + float(product[0].norm()) * float(product[1].norm()))
    if not abs(error - quantization.error) <= _allowed(error, report) + rounding:
        problems.append(f"the error is {error:.6g}, not the report's {quantization.error:.6g}")
    if not abs(without - quantization.error_without) <= _allowed(without, report) + U32 * size:
        problems.append(f"the error without PiSSA is {without:.6g}, not the report's {quantization.error_without:.6g}")
    if quantization.iterations == 1:
        problems += problems_of(*measure_factors(weight, A, B, report), report)
    elif not measure_norms(A, B, report) <= 1:
        problems.append(OTHER_NORMS)
    return QuantizedCheck(report.name, error, without, apart, adapted=True, problem="; ".join(problems))


def _allowed(error: float, report: LayerReport) -> float:
    """How far an error in the report may be from this one, but for the rounding of the residual."""
    return ((report.shape[1] / ENERGY_LANES + SMALL_ROUNDING) * U32 + OTHER_CODES) * error


def _compare(
    weight: Tensor,
    product: tuple[Tensor, Tensor] | None,
    tensors: Mapping[str, Tensor],
    stored: Packed,
    again: Packed,
    scheme: Scheme,
) -> tuple[int, str]:
    """Bytes that differ between what is stored and what quantizing again gives, and what is wrong with it."""
    expected = again.tensors()
    apart = sum(int((_bytes(tensors[key]) != _bytes(values)).sum()) for key, values in expected.items())
    if not apart:
        return 0, ""
    for key in (key for key in expected if "quant_state" in key):
        found, right = _state(tensors[key]), _state(expected[key])
        if found != right:  # bitsandbytes would read beyond the codes or the scales
            raise ValueError(f"{key} says {found}, not {right}")
    worst = _farther(weight, product, stored, again)
    error, least = (_error(weight, packed, product) for packed in (stored, again))
    if worst <= _tie(weight, scheme) and abs(error - least) <= OTHER_CODES * least:
        return apart, ""
    what = "Q(W − s·B·A)" if product is not None else "Q(W)"
    return apart, (
        f"{apart} bytes are not those of {what}: the error is {error / least if least else torch.inf:.6f} times as "
        f"large, and a value is farther away by {worst:.1e} of the largest"
    )


def _tie(weight: Tensor, scheme: Scheme) -> float:
    """How much farther a value may be than that of another machine, relative to the largest of W − s·B·A.

    Values are rounded to the weight's dtype. Double quantization rounds scales to 8 bits, whose steps are up to 1/64 of
    their range. int8 rounds the residual to float16 before it takes the scales.
    """
    rounding = 2 * UNIT_ROUNDOFF[weight.dtype] + 16 * U32
    if isinstance(scheme, FourBit):
        return rounding + (1 / 64 if scheme.double else 0.0)
    return rounding + 2 * UNIT_ROUNDOFF[torch.float16]


def _state(tensor: Tensor) -> dict[str, Any]:
    """What the JSON of bitsandbytes says of the format, without the mean of the scales."""
    return {key: value for key, value in json.loads(bytes(tensor.tolist())).items() if key != "nested_offset"}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _residual(weight: Tensor, product: tuple[Tensor, Tensor] | None, start: int, stop: int) -> Tensor:
    """Rows of W − s·B·A in float64."""
    rows = weight[start:stop].double()
    return rows if product is None else rows.addmm_(product[0][start:stop], product[1], alpha=-1)


def _rows(weight: Tensor) -> range:
    return range(0, len(weight), max(1, BLOCK_ELEMENTS // weight.shape[1]))


def _error(weight: Tensor, packed: Packed, product: tuple[Tensor, Tensor] | None) -> float:
    """‖W − W_q − s·B·A‖_F in float64."""
    values, squares = packed.dequantize(), 0.0
    for start in (blocks := _rows(weight)):
        stop = start + blocks.step
        error = _residual(weight, product, start, stop).sub_(values[start:stop].double())
        squares += float(error.square_().sum())
    return math.sqrt(squares)


def _farther(weight: Tensor, product: tuple[Tensor, Tensor] | None, stored: Packed, again: Packed) -> float:
    """How much farther a stored value is from W − s·B·A than that of ``again``, at most, over the largest |element|."""
    here, there, largest, worst = stored.dequantize(), again.dequantize(), 0.0, 0.0
    for start in (blocks := _rows(weight)):
        stop = start + blocks.step
        residual = _residual(weight, product, start, stop)
        largest = max(largest, float(residual.abs().amax()))
        farther = (residual - here[start:stop].double()).abs_() - (residual - there[start:stop].double()).abs_()
        worst = max(worst, float(farther.nan_to_num_(torch.inf, torch.inf).amax()))
    return worst / largest if largest else worst
