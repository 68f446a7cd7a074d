"""float32 on tensor cores: each number is split into bf16 pieces, whose products are exact in float32.

A piece has the next 8 significant bits of the number, so that three have all 24 (Henry, Tang & Heinecke 2019, arXiv
1904.06376).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def split(X):
    """The three bf16 pieces of a float32 tile, largest first."""
    first = X.to(tl.bfloat16)
    rest = X - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    return first, second, third


@triton.jit
def multiply_floats(B, A, total, ARITHMETIC: tl.constexpr):
    """total + B·A, both float32, by the six products of pieces that are not below the roundoff of float32."""
    B1, B2, B3 = split(B)
    A1, A2, A3 = split(A)
    total = exact(B2, A2, total, ARITHMETIC)
    total = exact(B1, A3, total, ARITHMETIC)
    total = exact(B3, A1, total, ARITHMETIC)
    total = exact(B1, A2, total, ARITHMETIC)
    total = exact(B2, A1, total, ARITHMETIC)
    return exact(B1, A1, total, ARITHMETIC)


@triton.jit
def exact(W, piece, total, ARITHMETIC: tl.constexpr):
    """total + W·piece, of numbers whose products are exact in float32."""
    if ARITHMETIC == "bf16":
        total = tl.dot(W, piece, total)
    else:
        total = tl.dot(W.to(tl.float32), piece.to(tl.float32), total, input_precision=ARITHMETIC)
    return total


INTERPRETED = not isinstance(split, triton.runtime.JITFunction)  # TRITON_INTERPRET was 1 when triton was imported


def arithmetic(dtype: torch.dtype, precision: int = 1) -> str:
    """The arithmetic, "bf16" or an ``input_precision``, of products of a weight of ``dtype``.

    bf16 weights are multiplied by bf16 pieces. The others take TF32, which has all fp16 numbers: once for a precision
    of 1, else three times, for the products of an upper and a lower part that matter in float32. AMD's matrix cores
    have no TF32, and Triton's interpreter multiplies the bits of bf16 as integers: both use float32.
    """
    if INTERPRETED:
        return "ieee"
    if dtype == torch.bfloat16:
        return "bf16"
    if torch.version.hip:
        return "ieee"
    return "tf32" if precision == 1 else "tf32x3"
