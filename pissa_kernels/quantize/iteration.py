"""W ≈ W_q + s·B·A: a quantized residual W_q and a 16-bit adapter (QPiSSA, Meng et al. 2024, arXiv 2404.02948, §4).

Each iteration takes A and B from the leading triplets of W − W_q, the W_q of the iteration before (0 at first), and
quantizes the residual that they leave: W_q = Q(W − s·B·A), with A and B as they are stored. W − W_q changes by the
error of a quantization, so its triplets are found from those of the iteration before (:mod:`pissa_kernels.svd.warm`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..factors import Factors, Recipe, rounded_factors, tolerance
from ..numerics import UNIT_ROUNDOFF, exact_arithmetic
from ..report import Quantization
from ..svd.driver import solve_batch
from ..svd.result import Certificate, TruncatedSVD
from ..svd.warm import WarmStart
from .scheme import Packed, Scheme

Iterations = int | Literal["auto"]
# Of the paper.
DEFAULT_ITERATIONS = 5
# Share of ‖W − Q(W)‖_F that an iteration has to gain for "auto" to go on, and the most that it makes.
LEAST_GAIN = 0.005
MOST_AUTOMATIC = 20
# Share of an iteration's error above which rounding W − W_q to 16 bits counts: int8's, and at ranks of half the width.
MOST_ROUNDING = 0.2


@dataclass(frozen=True, eq=False)
class QuantizedFactors(Factors):
    """A and B, and the residual beside them.

    Attributes:
        packed: W_q.
        quantization: what has been lost.
        singular_values: (r,) of s·B·A, the leading ones of W − W_q of the iteration before.
        certificate: of the triplets of that matrix, with the products of all iterations; its ``energy`` is Σσ̂²/‖W‖_F².
    """

    packed: Packed
    quantization: Quantization


def check_iterations(iterations: object) -> Iterations:
    """The number of iterations.

    Raises:
        ValueError: neither an integer ≥ 1 nor "auto".
    """
    if iterations == "auto" or (type(iterations) is int and iterations >= 1):
        return iterations
    raise ValueError(f"quant_iterations must be an integer ≥ 1 or 'auto', got {iterations!r}")


def quantized_factors(
    weight: Tensor,
    recipe: Recipe,
    scheme: Scheme,
    iterations: Iterations = DEFAULT_ITERATIONS,
    *,
    adapter_dtype: torch.dtype | None = None,
    nuclear: bool = False,
    plain: Tensor | None = None,
) -> QuantizedFactors:
    """Adapter and quantized residual of a weight that has passed the checks of :mod:`pissa_kernels.checks`.

    An iteration counts only if ‖W − W_q − s·B·A‖_F falls; the first that does not ends the loop.

    Args:
        weight: (out, in) in the dtype that a layer dequantizes to, any strides; only read.
        recipe: rank, scaling, accuracy and seed.
        scheme: the format.
        iterations: number of iterations, or "auto" to go on while an iteration gains half a percent of
            ‖W − Q(W)‖_F.
        adapter_dtype: dtype that will store A and B; by default the weight's.
        nuclear: whether to measure nuclear norms as well, by full SVDs.
        plain: values of :func:`quantized_weight`, where they are known.

    Raises:
        ValueError: NaN or Inf in the weight; A, B or the residual leave their range; the format cannot hold the shape.
    """
    dtype = weight.dtype  # that a layer dequantizes to
    tol = tolerance(dtype)
    weight = weight.contiguous()
    scratch = torch.empty_like(weight, dtype=torch.float32)
    # error that rounding W − W_q to 16 bits makes, about
    energy = _norm(scratch.copy_(weight)) ** 2
    rounding = UNIT_ROUNDOFF[dtype] * math.sqrt(energy)
    scratch -= scheme.quantize(scratch, dtype).dequantize() if plain is None else plain
    without, nuclear_without = _norm(scratch), _nuclear(scratch) if nuclear else None
    most = MOST_AUTOMATIC if iterations == "auto" else iterations
    best: _Iterate | None = None
    start: WarmStart | None = None
    passes = 0
    left = weight
    for iteration in range(1, most + 1):
        certify = start is None or iteration == most or iterations == "auto"
        if start is None:
            svd = solve_batch([left], recipe.rank, tol=tol, niter=recipe.niter, seed=recipe.seed)[0]
            start = WarmStart(svd, recipe.seed) if most > 1 else None
        else:
            svd = start.solve(left, tol, certify=certify)
        passes += svd.certificate.passes
        factors = rounded_factors([left], [svd], [recipe.scaling], adapter_dtype or dtype)[0]
        _subtract(scratch, weight, factors, recipe.scaling)
        packed = scheme.quantize(scratch, dtype)
        values = packed.dequantize()
        scratch -= values
        found = _norm(scratch)
        if best is not None and not found < best.error:
            break
        gained = best.error - found if best is not None else math.inf
        best = _Iterate(factors, svd, packed, found, iteration, certify, before=best.packed if best else None)
        if iterations == "auto" and gained < LEAST_GAIN * without:
            break
        left = weight  # the one before is not needed any more, and as large
        if iteration < most:
            left = _remainder(weight, values, exact=rounding > MOST_ROUNDING * found)
        del values
    assert best is not None
    factors = best.factors
    if not best.certified:  # an iteration that was not the last has turned out to be
        assert start is not None
        assert best.before is not None
        left = _remainder(weight, best.before.dequantize(), exact=False)
        certificate = start.certificate(left, best.svd, tol)
        passes += certificate.passes
        factors = replace(factors, certificate=certificate)
    factors = replace(factors, certificate=_of_weight(factors, passes, energy))
    nuclear_error = None
    if nuclear:
        _subtract(scratch, weight, factors, recipe.scaling)
        nuclear_error = _nuclear(scratch.sub_(best.packed.dequantize()))
    quantization = Quantization(scheme.name, best.error, without, best.iteration, nuclear_error, nuclear_without)
    return QuantizedFactors(**vars(factors), packed=best.packed, quantization=quantization)


def quantized_weight(weight: Tensor, scheme: Scheme) -> Packed:
    """Q(W), without PiSSA.

    Args:
        weight: (out, in) in the dtype that a layer dequantizes to, any strides; only read.
        scheme: the format.

    Raises:
        ValueError: NaN or Inf in the weight, or the format cannot hold it.
    """
    wide = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(wide.isfinite().all()):
        raise ValueError("the weight holds NaN or Inf")
    return scheme.quantize(wide, weight.dtype)


def quantized_residual(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, scheme: Scheme) -> Packed:
    """Q(W − s·B·A) for given factors: the same codes as those that :func:`quantized_factors` found with them.

    Args:
        weight: (out, in) in the dtype that a layer dequantizes to.
        lora_A: (r, in) float32.
        lora_B: (out, r) float32.
        scaling: s.
        scheme: the format.
    """
    residual = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    with exact_arithmetic(weight.device):
        ops.subtract_lowrank_(residual, lora_B, lora_A, scaling)
    return scheme.quantize(residual, weight.dtype)


def error_of(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, packed: Packed) -> float:
    """‖W − W_q − s·B·A‖_F, with the arguments of :func:`quantized_residual`."""
    left = weight.float() - packed.dequantize()
    with exact_arithmetic(weight.device):
        ops.subtract_lowrank_(left, lora_B, lora_A, scaling)
    return _norm(left)


@dataclass(frozen=True, eq=False)
class _Iterate:
    """Result of one iteration.

    Attributes:
        factors: A and B.
        svd: the triplets that they are from.
        packed: W_q.
        error: ‖W − W_q − s·B·A‖_F.
        iteration: its number, from 1.
        certified: whether the certificate of ``svd`` says anything of the accuracy.
        before: W_q of the iteration before; None in the first.
    """

    factors: Factors
    svd: TruncatedSVD
    packed: Packed
    error: float
    iteration: int
    certified: bool
    before: Packed | None


def _subtract(out: Tensor, weight: Tensor, factors: Factors, scaling: float) -> None:
    """W − s·B·A in float32."""
    out.copy_(weight)
    with exact_arithmetic(weight.device):
        ops.subtract_lowrank_(out, factors.lora_B, factors.lora_A, scaling)


def _remainder(weight: Tensor, values: Tensor, exact: bool) -> Tensor:
    """W − W_q, in float32, or in the wider dtype of the two, on which products are faster."""
    return torch.sub(weight, values.float() if exact else values)


def _of_weight(factors: Factors, passes: int, energy: float) -> Certificate:
    """The certificate of the triplets of W − W_q, with the captured energy relative to ‖W‖_F²."""
    captured = float(factors.singular_values.double().square().sum())
    share = min(captured / energy, 1.0) if energy > 0 else 1.0
    return replace(factors.certificate, passes=passes, energy=share)


def _norm(matrix: Tensor) -> float:
    # torch's norm adds up in float32, which is off by 6e-4 of itself at 4096×4096
    return math.sqrt(float(ops.sum_of_squares(matrix.unsqueeze(0))))


def _nuclear(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).sum(dtype=torch.float64))
