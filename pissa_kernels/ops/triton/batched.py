"""The operations of :mod:`pissa_kernels.ops.batched` as Triton kernels."""

from __future__ import annotations

from ..batched_reference import eigh, inverse_cholesky, subtract_lowrank_, sum_of_squares
from .product import product
from .split import split

__all__ = ["eigh", "inverse_cholesky", "product", "split", "subtract_lowrank_", "sum_of_squares"]
