"""Exact float32 arithmetic, unit roundoff, and the reconstruction bound in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """float32 means float32: no autograd, no autocast, no TF32 or bf16 behind a float32 product."""
    precision = torch.get_float32_matmul_precision()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


# Elements that are held in float64 at a time.
BLOCK_ELEMENTS = 1 << 18


# Unit roundoff of each storage dtype: half a unit in the last place, relative.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def reconstruction(weight: Tensor, residual: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """Worst |W − (W_res + s·B·A)| of any element, over what rounding allows it; Inf where anything is not finite.

    Allowed are the one rounding of the residual to its dtype, u·|W_res|, and the float32 product before it,
    (r + 2)·2⁻²⁴ times (|W| + s·|B|·|A|) (Higham 2002, §3.1). In float64, some rows at a time.

    Args:
        weight, residual: (out, in), of one dtype.
        lora_A, lora_B: (r, in) and (out, r).
        scaling: s.
    """
    u = UNIT_ROUNDOFF[residual.dtype]
    smallest = torch.finfo(residual.dtype).smallest_normal * u  # absolute floor: subnormal residuals
    A, B = lora_A.double(), lora_B.double()
    worst = 0.0
    for start in range(0, len(weight), rows := max(1, BLOCK_ELEMENTS // weight.shape[1])):
        W, R = weight[start : start + rows].double(), residual[start : start + rows].double()
        left = scaling * B[start : start + rows]
        product = (A.shape[0] + 2) * 2.0**-24 * (W.abs() + left.abs() @ A.abs())
        error = (W - R - left @ A).abs()
        block = float((error / (u * R.abs() * (1 + u) + product + smallest)).max())
        worst = max(worst, block if math.isfinite(block) else math.inf)
    return worst
