"""The bodies of csrc/, if it was built: C++ for CPUs, CUDA C++ for GPUs.

The libraries register operators of ``torch.ops.pissa_kernels``. They link against torch's stable ABI only, so that one
binary serves every torch from 2.10 on. They are loaded when a verb first needs them, not at import.

Products of fewer than eight columns are computed with eight. BLAS computes those of a single column: its matrix-vector
product is faster and has shorter sums.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import isa, reference
from .checks import VERBS as ALL_VERBS

VERBS: dict[str, tuple[str, ...]] = {"cpu": ALL_VERBS, "cuda": ("transpose_cast", "subtract_lowrank_")}
# Verbs that spend their time in products with the weight.
PRODUCTS = ("matmul", "rmatmul", "normal", "chebyshev_filter", "ritz", "triplets")
# The CPU library also defines the schemas, so it is loaded on every device.
LIBRARIES = {"cpu": "_csrc_cpu.so", "cuda": "_csrc_cuda.so"}
FOLDER = Path(__file__).parent
OLDEST_TORCH = (2, 10)
# What setup.py compiles the CUDA library to. Code for a compute capability runs on devices of its major version, from
# its minor version on; PTX is compiled by the driver for every device that is not older.
CUDA_CODE = ((8, 0), (9, 0), (10, 0), (12, 0))
CUDA_PTX = (9, 0)
# For each device, why its library cannot be loaded; None if it was loaded.
_FAILURES: dict[str, str | None] = {}


def verbs(device: str) -> tuple[str, ...]:
    """Names of the verbs that have a body for this type of device."""
    return VERBS.get(device, ())


def unsupported_reasons(verb: str, weight: Tensor) -> list[str]:
    """Why ``verb`` cannot run on ``weight``; an empty list if it can."""
    device = weight.device.type
    if device not in LIBRARIES:
        return [f"it has no body for {device} tensors"]
    reasons = [_failure("cpu"), _failure(device) if device != "cpu" else None]
    if device == "cuda" and not any(reasons):
        reasons.append(_capability_reason(weight.device.index or 0))
    if 1 not in weight.stride()[-2:] and weight.numel() > 1:
        reasons.append(f"neither dimension of the weight is contiguous (strides {weight.stride()})")
    return [reason for reason in reasons if reason]


def is_slow(verb: str) -> bool:
    """Whether torch's body of ``verb`` is faster on this CPU: the generic kernels multiply slower than BLAS.

    The library has been loaded.
    """
    return verb in PRODUCTS and isa.current() == "generic"


@cache
def _capability_reason(index: int) -> str | None:
    """Why the CUDA library cannot run on this device, or None."""
    major, minor = capability = torch.cuda.get_device_capability(index)
    if capability >= CUDA_PTX or any(code[0] == major and code[1] <= minor for code in CUDA_CODE):
        return None
    held = ", ".join(f"{code[0]}.{code[1]}" for code in CUDA_CODE)
    return (
        f"the device's compute capability is {major}.{minor}; the library has code for {held} and PTX for "
        f"{CUDA_PTX[0]}.{CUDA_PTX[1]}"
    )


def _failure(device: str) -> str | None:
    if device not in _FAILURES:
        if torch.compiler.is_compiling():  # torch.compile cannot trace the loading of a library
            return "its library was not loaded before this graph was traced"
        _FAILURES[device] = _load(device)
    return _FAILURES[device]


def _load(device: str) -> str | None:
    """Load the library for ``device``. Returns None, or the reason why it cannot be loaded."""
    library = FOLDER / LIBRARIES[device]
    if not library.exists():
        return f"csrc was not built for {device} (set PISSA_KERNELS_BUILD={device} when installing)"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        return f"its library needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is {torch.__version__}"
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"its library does not load: {error}"
    if device == "cpu":
        isa.choose()
        _register_fakes()
    return None


def _register_fakes() -> None:
    """Register the shapes and dtypes that the operators return, which torch.compile needs for tracing."""

    def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
        m, n = weight.shape
        return weight.new_empty(n, m, dtype=dtype)

    def subtract_lowrank_(
        weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
    ) -> None:
        return None

    def matmul(weight: Tensor, X: Tensor, pieces: int = 3) -> Tensor:
        return X.new_empty(*weight.shape[:-1], X.shape[-1])

    def rmatmul(weight: Tensor, Y: Tensor, pieces: int = 3) -> Tensor:
        return matmul(weight.mT, Y)

    def normal(weight: Tensor, X: Tensor, pieces: int = 3) -> tuple[Tensor, Tensor]:
        return matmul(weight, X), rmatmul(weight, X)

    def orthonormalize(panel: Tensor, basis: Tensor, near: int = 0) -> tuple[Tensor, Tensor]:
        return panel.new_empty(panel.shape), panel.new_empty(3)

    def chebyshev_filter(
        weight: Tensor, X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int = 3, gram: bool = False
    ) -> Tensor:
        return X.new_empty(X.shape)

    def ritz(weight: Tensor, Z: Tensor, rank: int, gram: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return Z.new_empty(Z.shape), Z.new_empty(Z.shape), Z.new_empty(Z.shape[1] + rank + 2)

    def triplets(weight: Tensor, V: Tensor, rank: int, image: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        m, n = weight.shape
        return V.new_empty(m, rank), V.new_empty(n, rank), V.new_empty(V.shape[1] + rank + 2)

    def chebyshev(
        weight: Tensor, H: Tensor | None, start: Tensor, rank: int, tol: float, max_products: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        m, n = weight.shape
        return start.new_empty(m, rank), start.new_empty(n, rank), start.new_empty(start.shape[1] + rank + 3)

    def lanczos(
        weight: Tensor, panel: Tensor, coupling: Tensor, rows: Tensor, image: Tensor | None, T: Tensor, *_: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return panel.new_empty(panel.shape), panel.new_empty(*panel.shape[1:] * 2), panel.new_empty(3)

    def quantize_blocks(values: Tensor, block: int, midpoints: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        blocks = (values.numel() + block - 1) // block
        return values.new_empty(values.numel() // 2, dtype=torch.uint8), values.new_empty(blocks)

    def gram(weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape[1], weight.shape[1], dtype=torch.float32)

    def sum_of_squares(weights: Tensor) -> Tensor:
        return weights.new_empty(weights.shape[0], dtype=torch.float64)

    products, panels = (matmul, rmatmul, normal), (orthonormalize, chebyshev_filter, ritz, triplets, chebyshev, lanczos)
    for fake in (*products, *panels, gram, sum_of_squares, quantize_blocks, transpose_cast, subtract_lowrank_):
        torch.library.register_fake(f"pissa_kernels::{fake.__name__}", fake)


def matmul(weight: Tensor, X: Tensor, pieces: int = 3) -> Tensor:
    """W·X in float32, or in ``pieces`` bfloat16 pieces on AMX. See :func:`pissa_kernels.ops.matmul`."""
    if X.shape[-1] == 1:
        return reference.matmul(weight, X)
    result: Tensor = torch.ops.pissa_kernels.matmul(weight, X, pieces)
    return result


def rmatmul(weight: Tensor, Y: Tensor, pieces: int = 3) -> Tensor:
    """Wᵀ·Y in float32, or in ``pieces`` bfloat16 pieces on AMX. See :func:`pissa_kernels.ops.rmatmul`."""
    if Y.shape[-1] == 1:
        return reference.rmatmul(weight, Y)
    result: Tensor = torch.ops.pissa_kernels.rmatmul(weight, Y, pieces)
    return result


def normal(weight: Tensor, X: Tensor, pieces: int = 3) -> tuple[Tensor, Tensor]:
    """Y = W·X and Wᵀ·Y in float32, or in ``pieces`` bfloat16 pieces on AMX. See :func:`pissa_kernels.ops.normal`."""
    if X.shape[-1] == 1:
        return reference.normal(weight, X)
    result: tuple[Tensor, Tensor] = torch.ops.pissa_kernels.normal(weight, X, pieces)
    return result


def gram(weight: Tensor) -> Tensor:
    """WᵀW in float32, on AMX tiles or by BLAS. See :func:`pissa_kernels.ops.reference.gram`."""
    if weight.dtype != torch.float32 and not (weight.dtype == torch.bfloat16 and isa.current() == "amx"):
        return reference.gram(weight)  # which copies a few rows at a time
    result: Tensor = torch.ops.pissa_kernels.gram(weight)
    return result


def sum_of_squares(weights: Tensor) -> Tensor:
    """‖W‖_F² of each weight of a batch. See :func:`pissa_kernels.ops.sum_of_squares`."""
    result: Tensor = torch.ops.pissa_kernels.sum_of_squares(weights)
    return result


def quantize_blocks(values: Tensor, block: int, midpoints: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a table of sixteen values, for blocks that share a scale. No verb: bitsandbytes takes its place.

    Args:
        values: (n,) float32, contiguous, n even.
        block: number of values that share a scale, a multiple of 32.
        midpoints: (15,) float32, ascending: what lies between two neighbors of the table, relative to the scale.
        codes: (16,) uint8, the code of each value of the table.

    Returns:
        (n/2,) uint8, the first of two codes in the upper half; and (⌈n/block⌉,) the largest |value| of each block.
    """
    result: tuple[Tensor, Tensor] = torch.ops.pissa_kernels.quantize_blocks(values, block, midpoints, codes)
    return result


def orthonormalize(panel: Tensor, basis: Tensor | None = None, near: int = 0) -> tuple[Tensor, Tensor]:
    """Block Gram–Schmidt with CholeskyQR. See :func:`pissa_kernels.ops.orthonormalize`."""
    basis = panel.new_empty(0, len(panel)) if basis is None else basis
    if basis.stride(-1) != 1:
        return reference.orthonormalize(panel, basis, near)
    result: tuple[Tensor, Tensor] = torch.ops.pissa_kernels.orthonormalize(panel, basis, near)
    return result


def chebyshev_filter(
    weight: Tensor, X: Tensor, HX: Tensor, edge: float, degree: int, pieces: int = 3, gram: bool = False
) -> Tensor:
    """T_degree(2H/edge − 1)·X. See :func:`pissa_kernels.ops.reference.chebyshev_filter`."""
    result: Tensor = torch.ops.pissa_kernels.chebyshev_filter(weight, X, HX, edge, degree, pieces, gram)
    return result


def chebyshev(
    weight: Tensor, H: Tensor | None, start: Tensor, rank: int, tol: float, max_products: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole iteration of :mod:`pissa_kernels.svd.chebyshev`. No verb, because no other backend has it."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.pissa_kernels.chebyshev(weight, H, start, rank, tol, max_products)
    return result


def lanczos(
    weight: Tensor,
    panel: Tensor,
    coupling: Tensor,
    rows: Tensor,
    image: Tensor | None,
    T: Tensor,
    size: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of :class:`pissa_kernels.svd.krylov.LanczosBasis`. No verb, because no other backend has it.

    Args:
        weight: (m, n).
        panel: (n, b) orthonormal, the next one of the basis.
        coupling: (k, b) off-diagonal block of T between the last k columns of the basis and the panel.
        rows: (limit, n) basis, contiguous; its next rows are written.
        image: (limit, m) its product with the weight, likewise; None if it is not wanted.
        T: (limit, limit) projected matrix, likewise.
        size: columns of the basis.
        count: number of steps, size + count·b ≤ limit.

    Returns:
        The next panel (n, b), its coupling (b, b), and figures (3,): the steps made, the least length that a projection
        has left of a column, relative to the longest, and whether the next panel is resolved (1 or 0). If it is not, it
        is still to be orthonormalized, and its coupling is unknown.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.pissa_kernels.lanczos(
        weight, panel, coupling, rows, image, T, size, count
    )
    return result


def ritz(weight: Tensor, Z: Tensor, rank: int, gram: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz pairs of H = WᵀW. See :func:`pissa_kernels.ops.reference.ritz`."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.pissa_kernels.ritz(weight, Z, rank, gram)
    return result


def triplets(weight: Tensor, V: Tensor, rank: int, image: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets and their residuals. See :func:`pissa_kernels.ops.reference.triplets`."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.pissa_kernels.triplets(weight, V, rank, image)
    return result


def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ in ``dtype``. See :func:`pissa_kernels.ops.transpose_cast`."""
    result: Tensor = torch.ops.pissa_kernels.transpose_cast(weight, dtype)
    return result


def subtract_lowrank_(
    weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
) -> Tensor:
    """W −= s·B·A in place. See :func:`pissa_kernels.ops.subtract_lowrank_`."""
    torch.ops.pissa_kernels.subtract_lowrank_(weight, lora_B, lora_A, scaling, fan_in_fan_out)
    torch.autograd.graph.increment_version(weight)  # operators of the stable ABI do not
    return weight
