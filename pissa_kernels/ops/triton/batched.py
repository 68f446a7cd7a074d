"""The operations on batches (:mod:`pissa_kernels.ops.batched`) as Triton kernels."""

from __future__ import annotations

from .cholesky import inverse_cholesky
from .compilation import compile_ahead
from .jacobi import eigh
from .product import product
from .split import split
from .subtract_lowrank import subtract_lowrank_batched_ as subtract_lowrank_
from .sum_of_squares import sum_of_squares_batched as sum_of_squares

__all__ = ["compile_ahead", "eigh", "inverse_cholesky", "product", "split", "subtract_lowrank_", "sum_of_squares"]
