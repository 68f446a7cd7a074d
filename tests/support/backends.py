"""Inputs for the tests of the faster backends, and torch's own float32 error, which theirs is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from pissa_kernels.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = [(1, 1), (1, 17), (17, 1), (63, 130), (130, 63)]
LARGE = [(300, 257), (4097, 33), (33, 4097)]
# Elements from which the norm of an error hardly depends on the seed.
MANY = 1000
LAYOUTS = ["row", "column", "strided"]
FASTER = ["csrc", "triton"]


def shapes(backend: str, layout: str) -> list[tuple[int, int]]:
    """Shapes to test; large ones in one layout only under Triton's interpreter, which takes a second for each."""
    return SMALL + LARGE if backend == "csrc" or DEVICE == "cuda" or layout == "strided" else SMALL


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def subtraction_error(
    dense: Tensor, B: Tensor, A: Tensor, scaling: float, fan_in_fan_out: bool, backend: str, exact: Tensor
) -> Tensor:
    """Norm of torch's error in W − s·B·A.

    Triton's interpreter has no fused multiply-add: it rounds s·B·A before it subtracts. Whether the reference's
    ``addmm`` rounds it, too, depends on the BLAS and the CPU; where it does not, its error at rank 1 is 0.85 to 0.9 of
    the other's. An interpreted kernel is compared with the larger error of these two float32 computations, a compiled
    one, which fuses, with the reference alone.
    """
    results = [reference.subtract_lowrank_(dense.clone(), B, A, scaling, fan_in_fan_out)]
    if backend == "triton" and DEVICE == "cpu":
        product = B @ A
        results.append((dense.float() - scaling * (product.mT if fan_in_fan_out else product)).to(dense.dtype))
    return max((result - exact).norm() for result in results)


def product_error(A: Tensor, P: Tensor, exact: Tensor) -> Tensor:
    """Norm of torch's error in A·P, both in float32.

    In what order BLAS adds the products, and whether it fuses them, depends on the shape and the CPU. In a result of 16
    elements the errors of two valid orders differ by a factor of two, and neither is a bound for the other. There the
    larger counts of BLAS's error and that of separately rounded products added one after the other, which is the same
    on every machine.
    """
    error = (A @ P - exact).norm()
    if exact.numel() >= MANY:
        return error
    total = torch.zeros_like(A @ P)
    for k in range(A.shape[1]):
        total = total + A[:, k : k + 1] * P[k]
    return max(error, (total - exact).norm())
