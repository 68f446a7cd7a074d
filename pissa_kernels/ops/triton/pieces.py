"""float32 on tensor cores: a sum of bf16 pieces, whose products are exact in float32.

Each piece has 8 significant bits of what the ones before it left over, so three hold all 24 of float32 (Henry, Tang &
Heinecke 2019, arXiv 1904.06376).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split(X):
    """The three bf16 pieces of a float32 tile, the largest first."""
    first = X.to(tl.bfloat16)
    rest = X - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    return first, second, third


@triton.jit
def multiply(W, X, total, PIECES: tl.constexpr, HALF_PRECISION: tl.constexpr):
    """total + W·X, X in the largest ``PIECES`` of its pieces, the smallest first.

    fp16 is not a subset of bf16, but it is one of TF32, and so is bf16: with fp16 weights the pieces are multiplied in
    ``HALF_PRECISION``, "tf32" or "ieee". float32 weights are multiplied as they are.
    """
    if W.dtype == tl.float32:
        return tl.dot(W, X, total, input_precision="ieee")
    first, second, third = split(X)
    if PIECES == 3:
        total = _exact(W, third, total, HALF_PRECISION)
    if PIECES >= 2:
        total = _exact(W, second, total, HALF_PRECISION)
    return _exact(W, first, total, HALF_PRECISION)


@triton.jit
def multiply_floats(B, A, total):
    """total + B·A, both float32, in the six products of their pieces that float32 can tell from nothing."""
    B1, B2, B3 = split(B)
    A1, A2, A3 = split(A)
    total = tl.dot(B3, A1, tl.dot(B1, A3, tl.dot(B2, A2, total)))
    return tl.dot(B1, A1, tl.dot(B2, A1, tl.dot(B1, A2, total)))


@triton.jit
def _exact(W, piece, total, HALF_PRECISION: tl.constexpr):
    if W.dtype == tl.bfloat16:
        return tl.dot(W, piece, total)
    return tl.dot(W.to(tl.float32), piece.to(tl.float32), total, input_precision=HALF_PRECISION)
